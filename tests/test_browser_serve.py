"""The page of `probe serve` in headless Chromium: it answers to drops and keys, asks nobody else, and runs no name.

    pip install '.[browser]' && apt-get install chromium && python -m pytest -m browser

Screenshots of the last run are kept where PROBE_SCREENSHOTS says.
"""

import base64
import functools
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from probe.cli import main
from tests.browsing import VIEWS, new_page
from tests.conftest import write_image_folder
from tests.test_serve import Client, serving

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def trained(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/, one of whose classes would be markup, and run/."""
    root = tmp_path_factory.mktemp("browser")
    images = write_image_folder(root / "images", {"train": 8, "test": 3})
    for split in ("train", "test"):
        (images / split / "red").rename(images / split / EVIL)
    backbone = ["--backbone", str(tiny_clip), "--precision", "float32", "--batch-size", "4"]
    assert main(["embed", str(images), *backbone, "--out", str(root / "cache")]) == 0
    quick = ["--no-report", "--penalties", "1", "0.1", "--folds", "2"]
    assert main(["fit-linear", str(root / "cache"), *quick, "--out", str(root / "run")]) == 0
    return root


@pytest.fixture(scope="module")
def client(trained: Path) -> Iterator[Client]:
    with serving(trained / "run", max_bytes=100_000) as (client, _):
        yield client


@pytest.fixture
def said() -> list[str]:
    """What pages wrote on the console, by errors and dialogs too; a test that expects something takes it out."""
    return []


@pytest.fixture
def open_page(browser, client: Client, said: list[str]):
    """A function that opens the page; at the end no page may have said anything, or asked another server."""
    asked: list[str] = []
    contexts = []

    def open_it(view: str = "light"):
        page = new_page(browser, view, said, asked)
        contexts.append(page.context)
        page.goto(client.url)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in asked if not url.startswith((client.url, "data:"))] == []


def drop(page: Any, *files: tuple[str, bytes]) -> None:
    """Drops files on the page, as a person does with the pointer."""
    given = [[name, base64.b64encode(data).decode()] for name, data in files]
    transfer = page.evaluate_handle(
        """async (files) => {
            const transfer = new DataTransfer();
            for (const [name, data] of files) {
                const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
                transfer.items.add(new File([bytes], name, { type: "image/png" }));
            }
            return transfer;
        }""",
        given,
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": transfer})
    assert "over" in page.locator("body").get_attribute("class")
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    page.locator(f".answer:not(.wait) >> nth={len(files) - 1}").wait_for()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def files_of(trained: Path, split: str) -> list[tuple[str, bytes]]:
    paths = sorted((trained / "images" / split).rglob("*.png"))
    return [(f"{path.parent.name}-{path.name}", path.read_bytes()) for path in paths]


@pytest.mark.parametrize("view", VIEWS)
def test_images_that_are_dropped_are_answered(open_page, axe, trained: Path, client: Client, view: str) -> None:
    page = open_page(view)
    assert page.locator("h1").inner_text() == "run"
    files = files_of(trained, "test")[1::3]
    drop(page, *files)
    answers = page.locator(".answer").all()
    assert [answer.locator(".file").inner_text() for answer in answers] == [name for name, _ in files]
    for answer, (_, data) in zip(answers, files, strict=True):
        _, wanted = client.predict(data)
        assert answer.locator("h3").inner_text() == wanted["predicted"]
        names = sorted(wanted["probabilities"], key=wanted["probabilities"].get, reverse=True)
        assert answer.locator(".bars .name").all_inner_texts() == names
        shares = [float(text.strip("<> %")) for text in answer.locator(".bars .value").all_inner_texts()]
        assert shares == pytest.approx([100 * wanted["probabilities"][name] for name in names], abs=0.1)
        widths = [bar.bounding_box()["width"] for bar in answer.locator(".bar").all()]
        assert widths == sorted(widths, reverse=True)
        assert answer.locator(".nearest img").count() == 6
        assert answer.locator(".label span:first-child").all_inner_texts() == [
            label for image in wanted["nearest"] for label in image["labels"]
        ]
        assert answer.locator("canvas").count() == 1
    assert page.evaluate("[...document.images].filter(image => !image.complete || !image.naturalWidth).length") == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it must not scroll sideways"
    if folder := os.environ.get("PROBE_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/serve-{view}.png", full_page=True)
    found = axe.run(page).response["violations"]
    assert [(one["id"], [node["target"] for node in one["nodes"]]) for one in found] == []


@pytest.mark.parametrize("view", VIEWS)
def test_the_empty_page_is_accessible(open_page, axe, view: str) -> None:
    page = open_page(view)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert [one["id"] for one in axe.run(page).response["violations"]] == []


def test_the_keyboard_suffices(open_page, trained: Path) -> None:
    page = open_page()
    page.on("filechooser", lambda _: None)  # from here on Chromium asks us: later it might be too late for the key
    page.keyboard.press("Tab")
    outline = "getComputedStyle(document.querySelector('.button')).outlineStyle"
    assert page.evaluate(outline) == "solid", "one sees where one is"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    assert chooser.value.is_multiple()
    name, data = files_of(trained, "train")[0]
    chooser.value.set_files({"name": name, "mimeType": "image/png", "buffer": data})
    page.locator(".answer:not(.wait)").wait_for()
    assert page.locator(".trained").inner_text() == "The classifier was trained on this very image."
    assert page.locator("[role=status]").text_content().startswith(f"{name}: ")
    assert page.locator(".answer").get_attribute("aria-busy") is None


def test_names_that_would_be_markup_are_shown_and_not_run(open_page, trained: Path) -> None:
    page = open_page()
    data = (trained / "images" / "train" / EVIL / "000.png").read_bytes()
    name = "<img src=x onerror=alert(2)>\u202egnp.exe"
    drop(page, (name, data))
    assert page.locator(".file").inner_text() == "<img src=x onerror=alert(2)>\\u{202e}gnp.exe"
    assert page.locator("h3").inner_text() == EVIL
    assert page.locator(".nearest .label span:first-child").first.inner_text() == EVIL
    assert EVIL in page.locator(".classes").inner_text()
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("script").count() == 2


def test_what_cannot_be_read_says_why(open_page, said: list[str]) -> None:
    page = open_page()
    drop(page, ("a.png", b"<!doctype html>"), ("b.png", bytes(100_001)))
    for answer, reason in zip(page.locator(".answer").all(), ("not a JPEG, PNG", "100,001 bytes"), strict=True):
        assert answer.locator("h3").inner_text() == "Cannot be read"
        assert reason in answer.locator(".why").inner_text()
    (line,) = said  # the browser's own, about the status
    assert "422" in line
    said.clear()


def test_more_files_than_go_at_once_all_come_back(open_page, trained: Path) -> None:
    files = files_of(trained, "train")
    assert len(files) == 24
    page = open_page()
    drop(page, *files)
    assert page.locator(".answer:not(.wait):not(.failed)").count() == 24
    assert page.locator(".file").all_inner_texts() == [name for name, _ in files]
    drop(page, *files[:1])
    page.locator(".answer:not(.wait) >> nth=24").wait_for()
    assert page.locator(".file").first.inner_text() == files[0][0], "the newest are on top"


def test_a_server_that_has_ended_is_said(browser, trained: Path) -> None:
    with serving(trained / "run") as (client, _):
        page = browser.new_page()
        page.goto(client.url)
    drop(page, *files_of(trained, "test")[:1])
    assert page.locator("h3").inner_text() == "No answer"
    assert "does probe serve still run?" in page.locator(".why").inner_text()
    page.close()


def test_the_page_of_another_site_gets_nothing(browser, trained: Path, tmp_path: Path) -> None:
    """Neither an answer, nor the work of one: a form, a fetch, a picture and a frame of another origin are refused."""
    image = base64.b64encode(files_of(trained, "test")[0][1]).decode()
    with serving(trained / "run") as (client, result):
        (tmp_path / "index.html").write_text(f"""<!doctype html><title>waiting</title>
            <img src="{client.url}predict"><iframe src="{client.url}"></iframe><iframe name="sink"></iframe>
            <form id="form" target="sink" method="post" enctype="multipart/form-data" action="{client.url}predict">
            <input type="file" name="image"></form><script>(async () => {{
            const image = new Blob([Uint8Array.from(atob("{image}"), c => c.charCodeAt(0))]);
            const got = [];
            for (const mode of ["cors", "no-cors"]) {{
                try {{ got.push((await fetch("{client.url}predict", {{method: "POST", mode, body: image}})).type); }}
                catch {{ got.push("refused"); }}
            }}
            const files = new DataTransfer(); files.items.add(new File([image], "x.png"));
            form.image.files = files.files; form.submit();
            setTimeout(() => {{ document.title = got.join(); }}, 500); }})();</script>""")
        handler = functools.partial(_Quiet, directory=str(tmp_path))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as other:
            threading.Thread(target=other.serve_forever, daemon=True).start()
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{other.server_port}/")
            for _ in range(100):
                if page.title() != "waiting":
                    break
                page.wait_for_timeout(50)
            assert page.title() == "refused,refused"
            page.close()
            other.shutdown()
    assert result["num_images"] == 0
