from __future__ import annotations

import base64
import io
import time
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from examples.demo_report import DemoReport
from examples.demo_report_page import data_uri, render_page, seconds_text, write_page
from tests.examples.browser import Browser, open_browser
from tests.examples.demo_parts import PROMPT, QuickPart, still

# (text, ratio) of visible text whose contrast to what lies behind it is below 4.5
LOW_CONTRAST = """
const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
  .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
const behind = element => {
  for (let e = element; e; e = e.parentElement) {
    const color = parse(getComputedStyle(e).backgroundColor);
    if (color.length === 3 || color[3] === 1) return color;
    if (color[3] > 0) throw new Error('half transparent');
  }
  throw new Error('no background');
};
const found = [];
for (const element of document.body.querySelectorAll('*')) {
  const own = [...element.childNodes].filter(n => n.nodeType === 3 && n.textContent.trim());
  if (!own.length || !element.checkVisibility()) continue;
  const [a, b] = [parse(getComputedStyle(element).color), behind(element)].map(luminance);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) found.push([own[0].textContent.trim(), ratio]);
}
return found;
"""


def make_report(**arguments: object) -> DemoReport:
    parts = [QuickPart("stills", **arguments), QuickPart("clips", frames=3)]
    return DemoReport(parts, facts={"Date": "today"}, began=time.perf_counter())


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The page while steps run, at the end, and after a failure."""
    folder, report = tmp_path_factory.mktemp("pages"), make_report()
    paths = {name: folder / f"{name}.html" for name in ("running", "done", "stopped")}
    report.run(lambda r: write_page(r, paths["running" if r.running else "done"]))
    broken = make_report(error=ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        broken.run(lambda r: write_page(r, paths["stopped"]))
    assert not [path for path in folder.iterdir() if path not in paths.values()]
    return paths


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_without_a_browser_tests_are_skipped_but_fail_in_ci(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="chromedriver"), open_browser(tmp_path):
        pass
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="chromedriver"), open_browser(tmp_path):
        pass


def test_every_picture_is_shown_and_nothing_is_fetched(browser: Browser, pages):
    for path in pages.values():
        browser.open(path)
        images = browser.run("return [...document.images].map(i => [i.complete && i.naturalWidth, i.alt])")
        assert len(images) >= 4
        assert all(width == 8 and len(alt) > 20 for width, alt in images)
        requested, complaints = browser.logs()
        assert path.as_uri() in requested
        assert not [url for url in requested if not url.startswith(("file:", "data:"))]
        assert complaints == []
        assert browser.run("return document.scripts.length") == 0


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_the_page_does_not_scroll_sideways_but_its_tables_do(browser, pages, width):
    browser.open(pages["done"], width=width)
    root = "document.documentElement"
    assert browser.run(f"return {root}.scrollWidth") <= width
    wide = "return [...document.querySelectorAll('.scroll')].map(e => e.scrollWidth > e.clientWidth)"
    assert any(browser.run(wide))
    focusable = "return [...document.querySelectorAll('.scroll')].every(e => e.tabIndex === 0)"
    assert browser.run(focusable)
    smallest = "return Math.min(...[...document.images].map(i => i.clientWidth).filter(w => w))"
    assert browser.run(smallest) >= 80  # of 8 pixels: enlarged, and large enough for a phone


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_legible_in_both_themes(browser, pages, theme):
    grounds = {}
    for name, path in pages.items():
        browser.open(path, prefers_color_scheme=theme)
        assert browser.run(LOW_CONTRAST) == [], name
        grounds[name] = browser.run("return getComputedStyle(document.body).backgroundColor")
    brightness = [int(v) for v in grounds["done"][4:-1].split(",")]
    assert (sum(brightness) > 600) == (theme == "light")


def test_the_check_of_contrast_finds_faint_text(browser, pages):
    browser.open(pages["done"], prefers_color_scheme="light")
    browser.run("document.querySelector('h1').style.color = '#bbb'")
    assert [text for text, _ in browser.run(LOW_CONTRAST)] == ["Three diffusion tools, tried on tiny models"]


def test_headings_come_in_order_and_links_lead_somewhere(browser, pages):
    browser.open(pages["done"])
    levels = browser.run("return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in zip(levels, levels[1:]))
    broken = """
      const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
      const named = [...document.querySelectorAll('[aria-labelledby]')]
        .map(e => e.getAttribute('aria-labelledby'));
      const links = [...document.links].map(a => a.getAttribute('href').slice(1));
      return [ids.length - new Set(ids).size, [...named, ...links].filter(n => !ids.includes(n))];
    """
    assert browser.run(broken) == [0, []]
    assert browser.run("return document.documentElement.lang") == "en"


def test_clips_stand_still_where_motion_is_not_wanted_and_on_request(browser, pages):
    shown = """return ['moving', 'still'].map(name =>
      [...document.querySelectorAll('img.' + name)].filter(i => i.checkVisibility()).length)"""
    browser.open(pages["done"], prefers_reduced_motion="no-preference")
    moving, still_ones = browser.run(shown)
    assert moving == 12
    assert still_ones == 0
    browser.run("document.querySelector('#flip').click()")
    assert browser.run(shown) == [0, 12]
    browser.open(pages["done"], prefers_reduced_motion="reduce")
    assert browser.run(shown) == [0, 12]
    browser.run("document.querySelector('#flip').click()")
    assert browser.run(shown) == [12, 0]


def test_the_note_tells_whether_it_runs(pages):
    running, done, stopped = (pages[name].read_text() for name in ("running", "done", "stopped"))
    assert "Still running: step 6 of 6." in running
    assert 'http-equiv="refresh"' in running
    assert "Stopped in step 2 of 6." in stopped
    assert "All of it took" in done
    assert "First picture after" in done
    for page in (done, stopped):
        assert "Still running" not in page
        assert "http-equiv" not in page


def test_wrong_readings_are_marked_by_a_sign_and_prompts_are_escaped(pages):
    page = pages["done"].read_text()
    assert page.count('class="side is-wrong"') == 8
    assert page.count('<span class="wrong" aria-hidden="true">✗</span> reads changed') == 8
    assert "wrong: reads changed" in page
    assert PROMPT not in page
    assert "&lt;b&gt;seven&lt;/b&gt; &amp; more" in page


def test_pictures_lie_in_the_page_without_loss():
    frames = [still(color) for color in ("red", "green", "blue")]
    content = base64.b64decode(data_uri(frames).removeprefix("data:image/png;base64,"))
    clip = Image.open(io.BytesIO(content))
    assert (clip.n_frames, clip.info["loop"]) == (3, 0)
    for index, frame in enumerate(frames):
        clip.seek(index)
        assert np.array_equal(np.asarray(clip.convert("RGB")), np.asarray(frame))
    alone = base64.b64decode(data_uri(frames[:1]).removeprefix("data:image/png;base64,"))
    assert not getattr(Image.open(io.BytesIO(alone)), "is_animated", False)


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (65.2, "65 s"), (339, "5 min 39 s")])
def test_times_are_short(seconds, text):
    assert seconds_text(seconds) == text


def test_a_page_without_any_step_done_is_whole():
    page = render_page(make_report())
    assert "0 of 3 steps done." in page
    assert page.rstrip().endswith("</html>")


def test_a_page_needs_no_facts():
    report = DemoReport([QuickPart("a")], began=time.perf_counter())
    report.run(lambda current: None)
    page = render_page(report)
    assert page.startswith("<!DOCTYPE html>")
    assert "All of it took" in page


def test_a_page_that_cannot_be_rendered_leaves_the_old_one(tmp_path):
    path, report = tmp_path / "report.html", make_report()
    path.write_text("old")
    report.sections[0].blocks["odd"] = None
    with pytest.raises(UndefinedError, match="has no attribute 'title'"):
        write_page(report, path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
