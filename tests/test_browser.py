"""The report in headless Chromium: it draws, answers to clicks and keys, asks nobody, runs no name, and is accessible.

    pip install '.[browser]' && apt-get install chromium && python -m pytest -m browser

Screenshots of the last run are kept where PROBE_SCREENSHOTS says.
"""

import os
import socket
from pathlib import Path

import pytest

from probe.cli import main
from probe.reporting.page import write_report
from probe.sources.origin import describe_origin
from tests.browsing import VIEWS, new_page
from tests.conftest import write_image_folder
from tests.runs import make_answers, save_run
from tests.test_report import EVIL, write_odd_images

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def report(tiny_clip, tmp_path_factory) -> Path:
    """The page of one `fit-linear`, two of whose test images have a wrong label."""
    root = tmp_path_factory.mktemp("browser")
    write_image_folder(root / "images", {"train": 8, "test": 8})
    for name in ("000.png", "001.png"):
        (root / "images/test/red" / name).rename(root / "images/test/blue" / f"red-{name}")
    assert main(["embed", str(root / "images"), "--backbone", str(tiny_clip), "--out", str(root / "cache")]) == 0
    options = ["--learning-curve", "--seeds", "2", "--penalties", "10", "1", "0.1"]
    assert main(["fit-linear", str(root / "cache"), *options, "--out", str(root / "run")]) == 0
    return root / "run" / "report.html"


@pytest.fixture
def open_page(browser):
    """A function that opens a file; at the end no page may have said or asked anything."""
    said: list[str] = []
    asked: list[str] = []
    contexts = []

    def open_file(path: Path, view: str = "light"):
        page = new_page(browser, view, said, asked)
        contexts.append(page.context)
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert {url.rpartition("/")[2] for url in asked if url.startswith("file:")} <= {"report.html", "audit.html"}


@pytest.mark.parametrize("view", VIEWS)
def test_it_draws_and_fits_the_screen(open_page, report, view):
    page = open_page(report, view)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it must not scroll sideways"
    assert page.locator("h1").inner_text() == "run"
    assert page.locator("figure.chart svg").count() >= 5
    broken = "[...document.images].filter(image => !image.complete || !image.naturalWidth).length"
    assert page.evaluate(broken) == 0
    colours = """() => { const c = document.getElementById('canvas'), pixels = c.getContext('2d')
        .getImageData(0, 0, c.width, c.height).data, found = new Set();
        for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] > 200) found.add(pixels.slice(i, i + 3).join());
        return found.size; }"""
    assert page.evaluate(colours) >= 3, "three classes have three colours"
    if folder := os.environ.get("PROBE_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/report-{view}.png", full_page=True)


@pytest.mark.parametrize("view", VIEWS)
def test_it_is_accessible(open_page, report, axe, view):
    page = open_page(report, view)
    page.locator("#matrix button").first.click()
    found = axe.run(page).response["violations"]
    assert [(one["id"], [node["target"] for node in one["nodes"]]) for one in found] == []


def test_the_audit_is_accessible(open_page, report, axe, tmp_path):
    assert main(["audit", str(report.parents[1] / "cache"), "--out", str(tmp_path)]) == 0
    page = open_page(tmp_path / "audit.html", "phone")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("h1").inner_text() == "Audit"
    assert [one["id"] for one in axe.run(page).response["violations"]] == []


def test_a_cell_of_the_matrix_shows_its_images(open_page, report):
    page = open_page(report)
    button = page.locator("#matrix .hit button").first
    count = int(button.inner_text())
    button.click()
    heading = page.locator("#cell h3").inner_text()
    assert heading.startswith("blue, answered blue: ")
    assert page.locator("#cell li").count() == count
    assert page.locator("#cell img").count() == count
    assert button.get_attribute("aria-pressed") == "true"


def test_the_matrix_is_put_in_order(open_page, report):
    page = open_page(report)

    def read():
        rows = page.locator("#matrix tbody tr").all()
        names = [row.locator("th").inner_text() for row in rows]
        errors = [int(row.get_attribute("data-errors")) for row in rows]
        cells = [[cell.inner_text() for cell in row.locator("td").all()] for row in rows]
        return names, errors, page.locator("#matrix thead th").all_inner_texts(), cells

    names, _, _, cells = read()
    page.select_option("#matrix-order", "errors")
    sorted_names, errors, heads, sorted_cells = read()
    assert errors == sorted(errors, reverse=True)
    assert heads == sorted_names
    for i, row in enumerate(sorted_names):
        for j, column in enumerate(sorted_names):
            assert sorted_cells[i][j] == cells[names.index(row)][names.index(column)]
    page.select_option("#matrix-order", "name")
    assert read()[0] == names


def test_tables_are_sorted_by_their_heads(open_page, report):
    page = open_page(report)
    table = page.locator("table.sortable")
    recall = [
        float(cell) for cell in table.locator("tbody td:nth-child(3)").evaluate_all("c => c.map(x => x.dataset.value)")
    ]
    assert recall == sorted(recall)
    table.locator("thead button").nth(2).click()
    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    again = [
        float(cell) for cell in table.locator("tbody td:nth-child(3)").evaluate_all("c => c.map(x => x.dataset.value)")
    ]
    assert again == sorted(recall, reverse=True)


def test_the_map_answers_to_pointer_and_keys(open_page, tmp_path, report):
    page = open_page(report)
    tip, canvas = page.locator("#tip"), page.locator("#canvas")
    assert tip.is_hidden()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    # Some point lies on the left edge: the longer side of the plane fills the width, or the height
    for step in range(0, int(box["height"]), 6):
        for x in range(8, int(box["width"]), 24):
            page.mouse.move(box["x"] + x, box["y"] + step)
            if tip.is_visible():
                break
        else:
            continue
        break
    assert tip.is_visible()
    assert "test/" in tip.inner_text()
    assert tip.locator("img").count() == 1
    page.mouse.move(0, 0)
    assert tip.is_hidden()
    page.check("input[value=wrong]")
    assert page.locator("#map-legend li").all_inner_texts() == ["right", "wrong"]
    wrong = sum(page.evaluate("JSON.parse(document.getElementById('data').textContent).rows.wrong"))
    canvas.focus()
    page.keyboard.press("ArrowRight")
    assert wrong >= 2
    assert "labelled " in tip.inner_text()
    first = tip.inner_text()
    page.keyboard.press("ArrowLeft")
    assert tip.inner_text() != first
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_names_that_would_be_markup_are_shown_and_not_run(open_page, tmp_path):
    names = [b"test/=cmd|' calc'.png", b"test/<img src=x onerror=alert(3)>.png", b'test/\xff".png', b"test/plain.png"]
    keys = write_odd_images(tmp_path / "images", names)
    answers = make_answers(4, EVIL, names=names, keys=keys, skill=-9)
    run = save_run(tmp_path / "run", answers, source=describe_origin(tmp_path / "images"))
    write_report(run)
    page = open_page(run / "report.html")
    before = page.locator("img").count()
    for button in page.locator("#matrix button").all():
        button.click()
        assert page.locator("#cell h3").inner_text().startswith(EVIL)
        assert page.locator("#cell img").count() == page.locator("#cell li").count()
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("script").count() == 2
    assert page.locator(".gallery img").count() >= before
    shown = page.locator("body").inner_text()
    assert "=cmd|' calc'.png" in shown
    assert "<img src=x onerror=alert(1)>" in shown


def test_the_policy_stops_what_is_not_ours(browser, report, tmp_path):
    """The page would not run a script that someone had put into it, nor ask for a picture elsewhere."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(1)
        there = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        planted = tmp_path / "report.html"
        script = f"<script>document.title = 'taken'</script><img src='{there}'>"
        planted.write_text(report.read_text().replace("</main>", f"{script}</main>"))
        page = browser.new_page()
        page.goto(planted.as_uri())
        assert page.title() == "run – report"
        page.close()
        with pytest.raises(TimeoutError):
            server.accept()
