"""One file from the data and what is in assets/."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import Any

# In the order in which they use each other.
_SCRIPTS = (
    "elements.js",
    "numbers.js",
    "tooltip.js",
    "view.js",
    "axes.js",
    "line_chart.js",
    "bar_chart.js",
    "distributions.js",
    "timeline.js",
    "samples.js",
    "configuration.js",
    "page.js",
)


def render(data: dict[str, Any]) -> str:
    """The page about ``page_data``."""
    parts = {
        "title": html.escape(data["title"]),
        "style": _asset("style.css"),
        "data": _as_script_text(data),
        "script": "\n".join(_asset(name) for name in _SCRIPTS),
    }
    page = _asset("page.html")
    for name, text in parts.items():  # no text contains another's mark: "<" is escaped in the data
        page = page.replace(f"<!--{name}-->", text)
    return page


def _asset(name: str) -> str:
    return (files("megatron_dppo.launch.report") / "assets" / name).read_text(encoding="utf-8")


def _as_script_text(data: dict[str, Any]) -> str:
    """JSON that cannot end the element it stands in, whatever a response says."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
