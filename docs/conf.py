"""The documentation as a site: tools/build_docs.sh runs Sphinx with this file, warnings as errors."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = "megatron_dppo"
author = "the megatron_dppo authors"
copyright = "the megatron_dppo authors, Apache-2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

myst_heading_anchors = 4  # links to headings are checked too

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "megatron_dppo"
html_show_sphinx = False

# Pages whose text is a file outside this folder.
PROJECT_PAGES = {
    "project/readme": "README.md",
    "project/contributing": "CONTRIBUTING.md",
    "project/changelog": "CHANGELOG.md",
    "project/log": "dev/LOG.md",
}
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def _with_links_of_the_site(app: Sphinx, page: str, source: list[str]) -> None:
    """Links are written for people who read the files in the repository; here they lead to the pages that those became."""
    file = ROOT / PROJECT_PAGES.get(page, f"docs/{page}.md")
    here = (ROOT / "docs" / page).parent
    text = file.read_text(encoding="utf-8") if page in PROJECT_PAGES else source[0]
    source[0] = _LINK.sub(lambda link: f"{link[1]}{_target(link[2], file, here)}{link[3]}", text)


def _target(link: str, file: Path, here: Path) -> str:
    if ":" in link:
        return link
    path = (file.parent / link).resolve()
    for page, name in PROJECT_PAGES.items():
        if path == ROOT / name:
            path = ROOT / "docs" / f"{page}.md"
    if path.is_dir():  # the site has no listings of folders
        path = next(
            (parent / "README.md" for parent in (path, *path.parents) if (parent / "README.md").is_file()), path
        )
        return _target(os.path.relpath(path, file.parent), file, here)
    return os.path.relpath(path, here)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _with_links_of_the_site)
