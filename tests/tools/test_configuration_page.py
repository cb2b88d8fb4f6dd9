"""docs/configuration.md is what tools/check/configuration_reference.py makes of the dataclasses."""

from __future__ import annotations

import runpy
from dataclasses import dataclass
from pathlib import Path

from megatron_dppo.training.config.schema import Config

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "check" / "configuration_reference.py"))


@dataclass
class _Section:
    """Ways of saying what an option means.

    Attributes:
        listed: said in the class,
            over two lines.
        both: said in the class too.
    """

    listed: int = 1  # not this
    below: int = 2
    """Said below the field."""
    both: int = 3
    """Said below, which is nearer."""
    # Said above, ...
    above: int = 4  # ... and behind
    number: int | None = None  # noqa: RUF100
    silent: int = 5


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == TOOL["render"](), "run tools/check/configuration_reference.py"


def test_every_option_says_what_it_means() -> None:
    assert not [line for line in TOOL["render"]().splitlines() if line.endswith("|  |")]


def test_every_way_of_saying_what_an_option_means_is_read() -> None:
    assert TOOL["field_meanings"](_Section) == {
        "listed": "said in the class, over two lines.",
        "below": "Said below the field.",
        "both": "Said below, which is nearer.",
        "above": "Said above, ... ... and behind",
        "number": "",
        "silent": "",
    }


def test_a_default_is_that_of_its_section_not_of_its_class() -> None:
    page = TOOL["render"]()
    assert Config().warm_start.optimizer.lr != Config().train.optimizer.lr
    assert f"| `warm_start.optimizer.lr` | float | `{Config().warm_start.optimizer.lr}` |" in page
    assert "| `tasks.train[].name` | str | required |" in page
