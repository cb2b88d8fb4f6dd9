"""The report in a real browser: nothing stays empty, nothing is asked of a network, and pointer and keyboard work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_dppo.launch.report.command import main
from tests.launch.report.chromium import CHROMIUM, NO_CHROMIUM, Page
from tests.launch.report.made_runs import RECORD, write_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)]

DRAWN = "path[d^=M], rect:not([visibility]), circle, article, td"
# {id of each panel: [number of things drawn, what it says instead]}
PANELS = f"""Object.fromEntries([...document.querySelectorAll("[data-panel]")].filter((e) => !e.hidden).map((e) =>
  [e.dataset.panel, [e.querySelectorAll("{DRAWN}").length, e.querySelector(".empty")?.textContent ?? ""]]))"""


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("report")
    runs = [str(write_run(folder, "first")), str(write_run(folder, "second", masked=0.3))]
    assert main([*runs, "--output", str(folder / "report.html")]) == 0
    with Page(folder / "report.html", folder / "profile") as page:
        yield page


@pytest.fixture
def page(two_runs) -> Iterator[Page]:
    yield two_runs
    assert two_runs.problems == []


def text(page: Page, selector: str) -> str:
    return page.evaluate(f"document.querySelector({selector!r}).innerText")


def test_every_panel_of_two_runs_is_drawn(page, tmp_path) -> None:
    panels = page.evaluate(PANELS)
    assert len(panels) > 25
    assert {name for name, (drawn, instead) in panels.items() if not drawn or instead} == set()
    assert len(page.screenshot(tmp_path / "page.png")) > 100_000  # a blank page of this size has a tenth of that


def test_what_is_clicked_happens_and_nothing_becomes_empty(page) -> None:
    page.point("#runs button:nth-child(2)", click=True)
    assert page.evaluate("document.querySelectorAll('[data-panel^=timeline]:not([hidden])').length") == 1
    page.point("#runs button:nth-child(1)", click=True)
    said = {instead for _, instead in page.evaluate(PANELS).values() if instead}
    assert said == {"All runs are switched off."}
    for number in (1, 2):
        page.point(f"#runs button:nth-child({number})", click=True)
    for axis in page.evaluate("[...document.querySelectorAll('#x-axis option')].map((e) => e.value)"):
        page.choose("#x-axis", axis)
    page.choose("#x-axis", "step")
    for measure in ("divergence", "abs_log_ratio", "tokens", "masked"):
        page.choose("#measure", measure)
    for part in ("0", "50", "100"):
        page.choose("#around", part)
    page.choose("#smoothing", "1")
    page.choose("#smoothing", "5")
    assert text(page, "#smoothing-value") == "5 steps"
    for button in range(3):
        page.evaluate(f"document.querySelectorAll('figure button.small')[{button}].click()")
    names = page.evaluate("[...document.querySelectorAll('#any-metric option')].map((e) => e.value)")
    assert "dppo/mask_fraction" in names
    for name in names:
        page.choose("#any-metric", name)
        assert page.evaluate("document.querySelectorAll('[data-panel=any] path').length") > 0, name
    for theme in ("dark", "light"):
        page.choose("#theme", theme)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(21, 23, 26)") == (theme == "dark")
    assert {name for name, (drawn, instead) in page.evaluate(PANELS).items() if not drawn or instead} == set()


def test_pointer_and_keys_read_the_values(page) -> None:
    page.point("[data-panel='learning-0'] svg.chart")
    shown = text(page, "#tooltip")
    assert shown.startswith("step ")
    assert "first" in shown
    assert "second" in shown
    page.evaluate("document.querySelector(\"[data-panel='distribution-reward'] svg.chart\").focus()")
    page.press("End")
    page.press("ArrowLeft")
    assert "share" in page.evaluate("document.activeElement.closest('figure').innerText").lower()
    assert page.evaluate("document.getElementById('spoken').textContent").startswith("reward: 0.9")
    page.press("Escape")
    assert page.evaluate("document.getElementById('tooltip').hidden")


def test_tokens_are_coloured_and_tell_their_numbers(page) -> None:
    for order in ("best", "held", "divergence", "latest", "worst"):
        page.choose("#order", order)
    colours = set()
    for colouring in ("divergence", "ratio", "surprise", "weight"):
        page.choose("#colouring", colouring)
        colours.add(page.evaluate("[...document.querySelectorAll('.token')].map((e) => e.style.background).join()"))
    assert len(colours) == 4
    assert page.evaluate("document.querySelectorAll('#sample-list .token.held').length") > 1
    page.evaluate("document.querySelector('#sample-list .tokens .token:has(+ .token)').focus()")
    page.press("ArrowRight")
    spoken = page.evaluate("document.getElementById('spoken').textContent")
    assert spoken.startswith('token 1: "t1 ": weight w 1, divergence D 0.01')
    before = page.evaluate("document.querySelectorAll('.sample').length")
    page.evaluate("[...document.querySelectorAll('button')].find((e) => e.textContent.startsWith('Show more')).click()")
    assert page.evaluate("document.querySelectorAll('.sample').length") > before


def test_a_response_is_text_whatever_it_says(page) -> None:
    page.point("#traced", click=True)
    assert "</script><img src=x onerror=" in text(page, "#sample-list")
    assert page.evaluate("window.harmed === undefined && document.querySelectorAll('img').length === 0")
    page.point("#traced", click=True)


def test_the_difference_of_two_configurations_is_shown(page) -> None:
    keys = "[...document.querySelectorAll('#configuration tbody tr')].map((e) => e.cells[0].textContent)"
    assert set(page.evaluate(keys)) == {"run.name", "algorithm.loss.delta_low"}
    page.point("#all-options", click=True)
    assert len(page.evaluate(keys)) > 100
    page.evaluate("document.querySelector('#option-search').value = 'wandb'")
    page.evaluate("document.querySelector('#option-search').dispatchEvent(new Event('input'))")
    assert {key.split(".")[1] for key in page.evaluate(keys)} == {"wandb"}
    page.evaluate("document.querySelector('#option-search').value = ''")
    page.point("#all-options", click=True)


def test_the_quick_starts_record_says_in_words_what_it_lacks(tmp_path) -> None:
    assert main([str(RECORD), "--output", str(tmp_path / "report.html")]) == 0
    with Page(tmp_path / "report.html", tmp_path / "profile", width=420) as page:
        panels = page.evaluate(PANELS)
        assert {name for name, (drawn, instead) in panels.items() if not drawn and not instead} == set()
        said = {name for name, (_, instead) in panels.items() if instead}
        assert said == {
            "samples",
            *(f"distribution-{kind}" for kind in ("reward", "length", "position", "probability")),
        }
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # on a phone
        assert page.problems == []


def test_a_run_amid_its_first_step_is_no_blank_page(tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "eval/accuracy": 0.1, "eval/reward_mean": 0.5}\n')
    assert main([str(run), "--output", str(tmp_path / "report.html")]) == 0
    with Page(tmp_path / "report.html", Path(tmp_path / "profile")) as page:
        panels = page.evaluate(PANELS)
        assert {name for name, (drawn, instead) in panels.items() if not drawn and not instead} == set()
        assert panels["learning-0"][1] == "No run has these metrics."
        assert page.problems == []
