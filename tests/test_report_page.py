"""The report as people meet it: opened from disk in a real browser."""

from __future__ import annotations

import contextlib
import shutil

import pytest
import written_results as written

playwright = pytest.importorskip("playwright.sync_api")
from evals.report import collect, write_html  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, Debian's or Google's"),
]
ARGUMENTS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")
expect = playwright.expect
expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    base = [1] * 30 + [0] * 30
    small = [1, 1, 1, 0, 0, 1] + [1] * 24 + [0] * 30
    models = [
        written.model(
            folder / name,
            [written.questions(right), written.documents([1.0 + shift + i / 50 for i in range(9)])],
            bits,
        )
        for name, right, bits, shift in (("base", base, 16.0, 0.0), ("small", small, 4.5, 0.2))
    ]
    steps = {i: [written.questions([1] * (10 * i) + [0] * (60 - 10 * i))] for i in range(1, 5)}
    series = written.sweep(folder / "run", steps)
    return write_html(folder / "report.html", collect([*models, series]), title="A report")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as run:
        found = run.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS])
        yield found
        found.close()


@contextlib.contextmanager
def visit(browser, path, **options):
    """The page, which may ask for nothing but itself, and complain of nothing."""
    context = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **options})
    page = context.new_page()
    page.set_default_timeout(60_000)
    asked, complaints = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console",
        lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None,
    )
    page.goto(path.as_uri())
    yield page
    title = page.title()
    context.close()
    assert [url for url in asked if not url.startswith(("data:", path.as_uri()))] == []
    assert complaints == []
    assert title == "A report"  # What a model wrote would change it, were it run.


def test_examples_are_filtered_by_task_outcome_and_disagreement(browser, report):
    with visit(browser, report) as page:
        entries = page.locator("#list li")
        expect(page.locator("#found")).to_have_text("69 examples")
        assert page.evaluate("scrollY") == 0  # It opens at its beginning, not at an example.
        page.locator("#task").select_option("questions")
        expect(entries).to_have_count(60)
        page.locator("#differ").check()
        differing = entries.count()
        assert 2 <= differing < 60
        page.locator("#of").select_option("small")
        page.locator("#outcome").select_option("incorrect")
        first = page.locator("#example .answer").nth(1)
        expect(first.locator("h3")).to_contain_text("small")
        expect(first.locator("h3")).to_contain_text("incorrect")
        assert entries.count() < differing
        page.locator("#differ").uncheck()
        page.locator("#outcome").select_option("")
        page.locator("#search").fill("<SCRIPT>")
        expect(page.locator("#example .prompt, #example pre").first).to_be_visible()
        expect(page.locator("#example .answer pre").first).to_contain_text(written.EVIL)
        assert page.locator("#example img, #example script").count() == 0
        page.locator("#search").fill("no such text")
        expect(page.locator("#example")).to_have_text("No example is like that.")


def test_the_keyboard_reaches_every_example(browser, report):
    with visit(browser, report) as page:
        page.locator("#task").select_option("questions")
        chosen = page.locator('#list [aria-selected="true"]')
        page.locator("h1").click()
        page.keyboard.press("j")
        page.keyboard.press("j")
        page.keyboard.press("k")
        expect(chosen).to_have_attribute("id", "entry-1")
        page.locator("#list").focus()
        page.keyboard.press("End")
        expect(chosen).to_have_attribute("id", "entry-59")
        page.keyboard.press("ArrowDown")
        expect(chosen).to_have_attribute("id", "entry-59")
        page.keyboard.press("Home")
        expect(chosen).to_have_attribute("id", "entry-0")
        expect(page.locator("#list")).to_have_attribute("aria-activedescendant", "entry-0")
        page.keyboard.press("/")
        expect(page.locator("#search")).to_be_focused()
        page.keyboard.type("jd")
        expect(page.locator("#search")).to_have_value("jd")
        expect(page.locator("#differ")).not_to_be_checked()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_tables_and_plots_show_in_light_and_dark(browser, report, scheme, tmp_path):
    with visit(browser, report, color_scheme=scheme) as page:
        look = "getComputedStyle(document.body).backgroundColor"
        before = page.evaluate(look)
        assert sum(int(part) for part in before[4:-1].split(",")) > 500 or scheme == "dark"
        assert page.locator("#bits .plot").count() == 2
        assert page.locator("#steps .plot .dot").count() == 4
        dot = page.locator("#bits .dot").first.bounding_box()
        assert dot
        assert dot["width"] > 3
        sub = page.locator(".results tr.sub").first
        expect(sub).to_be_hidden()
        page.locator("#every").check()
        expect(sub).to_be_visible()
        page.locator("#theme").click()
        assert page.evaluate(look) != before
        wide = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.set_viewport_size({"width": 420, "height": 800})
        assert wide
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True)
