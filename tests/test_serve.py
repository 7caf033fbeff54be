"""`probe serve`: answers are those of `predict`, whoever asks at the same time, and what is not meant is refused."""

import asyncio
import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_spec_validator import validate
from PIL import Image

from probe import bundle
from probe.cache import Cache
from probe.cli import main
from probe.config import PredictConfig, ServeConfig
from probe.errors import ConfigError, InputError, MismatchError
from probe.predict import predict
from probe.serve import serve
from probe.serving import app
from probe.serving.batching import Batcher, BusyError, Room
from tests.checkpoints import write_tiny_clip
from tests.conftest import write_image_folder

pytestmark = pytest.mark.timeout(300)
BATCH = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/, clip/, cache/, run/ (fit-linear), tuned/ (finetune) and labelled/ (several labels)."""
    root = tmp_path_factory.mktemp("serve")
    images = write_image_folder(root / "images", {"train": 8, "test": 3})
    write_tiny_clip(root / "clip")
    backbone = ["--backbone", str(root / "clip"), "--precision", "float32", "--batch-size", str(BATCH)]
    quick = ["--no-report", "--penalties", "1", "0.1", "--folds", "2"]
    assert main(["embed", str(images), *backbone, "--out", str(root / "cache")]) == 0
    assert main(["fit-linear", str(root / "cache"), *quick, "--out", str(root / "run")]) == 0
    tuning = ["--init", "zeros", "--epochs", "1", "--keep", "finetuned", "--no-report"]
    assert main(["finetune", str(images), *backbone[:2], *tuning, "--out", str(root / "tuned")]) == 0
    paths = sorted(images.rglob("*.png"))
    lines = [f"{p.relative_to(images)},{int('red' in str(p))},{int('red' not in str(p))},{p.parts[-3]}" for p in paths]
    (images / "labels.csv").write_text("\n".join(["path,warm,cold,split", *lines]))
    columns = ["--label-column", "warm", "--label-column", "cold"]
    assert main(["embed", str(images / "labels.csv"), *backbone, *columns, "--out", str(root / "two")]) == 0
    assert main(["fit-linear", str(root / "two"), *quick, "--out", str(root / "labelled")]) == 0
    return root


class Client:
    """Speaks to a server that runs in this process."""

    def __init__(self, url: str) -> None:
        self.url, self.address = url, urllib.parse.urlsplit(url).netloc

    def ask(
        self,
        method: str = "GET",
        path: str = "/",
        body: Any = None,
        headers: dict[str, str] | None = None,
        chunked: bool = False,
    ) -> tuple[int, dict[str, str], bytes]:
        """Returns: status, headers in lower case, body."""
        connection = http.client.HTTPConnection(self.address, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {}, encode_chunked=chunked)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def predict(self, data: bytes, **options: Any) -> tuple[int, dict[str, Any]]:
        """Returns: status, and the JSON."""
        status, _, body = self.ask("POST", options.pop("path", "/predict"), data, **options)
        return status, json.loads(body)

    def hold(self, data: bytes) -> socket.socket:
        """A request whose last byte is still to come."""
        held = socket.create_connection(self.address.split(":"), timeout=60)
        head = f"POST /predict HTTP/1.1\r\nHost: {self.address}\r\nContent-Length: {len(data)}\r\n\r\n"
        held.sendall(head.encode() + data[:-1])
        return held


@contextlib.contextmanager
def serving(run: Path, **options: Any) -> Iterator[tuple[Client, dict[str, Any]]]:
    """Runs the verb in a thread: a client, and the verb's result, which is filled when it has ended."""
    ready, stop, result = threading.Event(), threading.Event(), {}
    urls: list[str] = []
    config = ServeConfig(run=run, port=0, **{"batch_size": BATCH, "num_workers": 2, **options})
    errors: list[BaseException] = []

    def work() -> None:
        try:
            result.update(serve(config, should_stop=stop.is_set, on_ready=lambda url: (urls.append(url), ready.set())))
        except BaseException as err:
            errors.append(err)
        finally:
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    try:
        if not errors:
            yield Client(urls[0]), result
    finally:
        stop.set()
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture(scope="module")
def client(trained: Path) -> Iterator[Client]:
    options = {"max_bytes": 200_000, "max_pixels": 1_000_000, "allow_host": ("photos.example",)}
    with serving(trained / "run", **options) as (client, _):
        yield client


def picture(seed: int = 0, size: tuple[int, int] = (24, 20), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def form(*files: bytes, name: str = "x.png", fields: int = 0) -> tuple[bytes, dict[str, str]]:
    """A multipart body, and its header."""
    boundary = b"--=bound="
    parts = [b'content-disposition: form-data; name="f%d"\r\n\r\nx' % i for i in range(fields)]
    head = f'content-disposition: form-data; name="image"; filename="{name}"\r\ncontent-type: image/png\r\n\r\n'
    parts += [head.encode() + file for file in files]
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts) + b"--" + boundary + b"--\r\n"
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary.decode()}"}


# Answers


@pytest.mark.parametrize("run", ["run", "tuned", "labelled"])
def test_answers_are_those_of_predict_to_the_bit(run: str, trained: Path) -> None:
    images = trained / "images" / "test"
    wanted = predict(PredictConfig(run=trained / run, images=(images,), batch_size=BATCH))
    with serving(trained / run) as (client, _):
        described = json.loads(client.ask(path="/openapi.json")[2])
        validate(described)
        for line in wanted["predictions"]:
            data = (images / line["path"]).read_bytes()
            status, raw = client.predict(data)
            assert status == 200
            assert_described(described, status, raw)
            assert raw["predicted"] == line["predicted"]
            assert raw["probabilities"] == dict(zip(wanted["class_names"], line["probabilities"], strict=True))
            body, headers = form(data)
            assert client.predict(body, headers=headers) == (200, raw)
        if run == "tuned":  # whose cache, if any, is of another backbone
            assert raw["nearest"] == []
            assert "The nearest training images are not known" in client.ask()[2].decode()
        if run == "labelled":
            assert isinstance(raw["predicted"], list)
            assert {label for image in raw["nearest"] for label in image["labels"]} <= {"warm", "cold"}


def test_requests_at_once_are_answered_together_each_with_its_own(trained: Path) -> None:
    """And to the bit as when it is asked alone, whatever else is in the batch."""
    images = [picture(seed) for seed in range(24)]
    with serving(trained / "run") as (client, result):
        alone = [client.predict(data) for data in images]
        with ThreadPoolExecutor(12) as threads:
            together = list(threads.map(client.predict, images))
    assert together == alone
    assert {status for status, _ in alone} == {200}
    assert len({json.dumps(answer) for _, answer in alone}) == len(images)
    assert result["num_images"] == 48
    assert result["num_steps"] < 40, "24 alone, and the other 24 in fewer steps than images"


def test_nothing_is_compiled_once_it_is_ready(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    import jax

    with jax.log_compiles(), ThreadPoolExecutor(6) as threads:
        assert {status for status, _ in threads.map(client.predict, [picture(seed) for seed in range(30, 40)])} == {200}
    assert [record.message for record in caplog.records if "ompil" in record.message] == []


def test_the_nearest_training_images_are_the_nearest(client: Client, trained: Path) -> None:
    cache = Cache.open(trained / "cache")
    train = np.flatnonzero(cache.table.splits == "train")
    test = np.flatnonzero(cache.table.splits == "test")
    centred = cache.embeddings() - cache.embeddings()[train].mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    for row in test:
        data = (trained / "images" / os.fsdecode(cache.table.names[row])).read_bytes()
        _, answer = client.predict(data)
        cosines = centred[train] @ centred[row]
        order = np.argsort(-cosines)[:6]
        assert [image["path"] for image in answer["nearest"]] == [
            os.fsdecode(cache.table.names[i]) for i in train[order]
        ]
        np.testing.assert_allclose([image["cosine"] for image in answer["nearest"]], cosines[order], atol=1e-4)
        assert [image["labels"] for image in answer["nearest"]] == [
            [cache.class_names[cache.table.labels[i]]] for i in train[order]
        ]
        assert not answer["trained_on"]
        assert {image["thumbnail"] for image in answer["nearest"]} == {None}


def test_a_training_image_is_known_and_nearest_to_itself(client: Client, trained: Path) -> None:
    data = (trained / "images" / "train" / "green" / "003.png").read_bytes()
    _, answer = client.predict(data)
    assert answer["trained_on"]
    assert answer["nearest"][0]["path"] == "train/green/003.png"
    assert answer["nearest"][0]["cosine"] == 1


def test_thumbnails_are_ours_and_only_of_what_is_still_there(trained: Path, tmp_path: Path) -> None:
    images = shutil.copytree(trained / "images", tmp_path / "images")
    red = images / "train" / "red"
    data = (red / "000.png").read_bytes()
    with serving(trained / "run", images=images, nearest=12) as (client, _):
        (red / "001.png").unlink()
        (red / "002.png").write_bytes(picture(1))
        (red / "003.png").write_bytes(b"no picture")
        _, answer = client.predict(data, path="/predict?thumbnails=true")
        pictures = {image["path"]: image["thumbnail"] for image in answer["nearest"]}
        assert [
            uri for path, uri in pictures.items() if path.endswith(("red/001.png", "red/002.png", "red/003.png"))
        ] == [None] * 3
        mime, _, encoded = pictures["train/red/000.png"].partition(";base64,")
        assert mime == "data:image/webp"
        shown = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert shown.size == (128, 128)
        means = np.asarray(shown.convert("RGB")).mean(axis=(0, 1))
        np.testing.assert_allclose(means, np.asarray(Image.open(red / "000.png")).mean(axis=(0, 1)), atol=12)
        (red / "000.png").unlink()
        assert client.predict(data, path="/predict?thumbnails=1")[1] == answer, "what was shown once is kept"


def test_a_fine_tuned_run_has_neighbours_in_a_cache_of_its_own_backbone(trained: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(MismatchError, match=r"another backbone than the fine-tuned one.*probe embed"),
        serving(trained / "tuned", cache=trained / "cache"),
    ):
        pass
    options = ["--backbone", str(trained / "tuned" / "backbone"), "--precision", "float32", "--batch-size", "4"]
    assert main(["embed", str(trained / "images"), *options, "--out", str(tmp_path / "cache")]) == 0
    with serving(trained / "tuned", cache=tmp_path / "cache") as (client, _):
        data = (trained / "images" / "train" / "red" / "000.png").read_bytes()
        assert client.predict(data)[1]["nearest"][0]["path"] == "train/red/000.png"


# What is refused


def test_what_is_no_image_is_refused_with_its_reason(client: Client) -> None:
    whole = picture(size=(64, 64), kind="JPEG")
    bomb = io.BytesIO()
    Image.new("1", (4000, 4000)).save(bomb, "PNG")
    cases = {
        b"": "empty",
        b"<!doctype html>": "format",
        whole[: len(whole) // 2]: "truncated",
        bomb.getvalue(): "too-big",
        picture(size=(1000, 2)): "aspect",
    }
    for data, reason in cases.items():
        status, answer = client.predict(data)
        assert (status, answer["error"]["reason"]) == (422, reason)
        assert answer["error"]["detail"]
    assert client.predict(picture())[0] == 200, "and the server goes on"


def test_large_requests_are_refused_however_they_say_their_size(client: Client) -> None:
    data = bytes(200_001)
    assert client.predict(data)[0] == 413
    body, headers = form(data)
    assert client.predict(body, headers=headers)[0] == 413
    pieces = iter([bytes(150_000), bytes(150_000)])
    status, _, answer = client.ask("POST", "/predict", pieces, {"Transfer-Encoding": "chunked"}, chunked=True)
    assert status == 413
    assert "--max-bytes" in json.loads(answer)["error"]["detail"]
    pieces = iter([body[:150_000], body[150_000:]])
    headers = {**headers, "Transfer-Encoding": "chunked"}
    assert client.ask("POST", "/predict", pieces, headers, chunked=True)[0] == 413
    # No byte of it needs to have come
    with socket.create_connection(client.address.split(":"), timeout=60) as early:
        early.sendall(f"POST /predict HTTP/1.1\r\nHost: {client.address}\r\nContent-Length: 999999999\r\n\r\n".encode())
        assert early.recv(100).startswith(b"HTTP/1.1 413")


def test_a_form_has_one_file(client: Client) -> None:
    for body, headers in (form(), form(picture(), picture(1)), form(fields=1), (b"nonsense", form()[1])):
        status, answer = client.predict(body, headers=headers)
        assert status == 400, answer
        assert answer["error"]["detail"]
    body, headers = form(picture(), fields=3)
    assert client.predict(body, headers=headers)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:{port}"},
        {"Host": "more.photos.example"},
        {"Host": "127.0.0.1.evil.example:{port}"},
        {"Host": ""},
        {"Host": "[::2]:{port}"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:1"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_other_sites_are_refused(headers: dict[str, str], client: Client) -> None:
    port = client.address.partition(":")[2]
    headers = {name: value.format(port=port) for name, value in headers.items()}
    wanted = 421 if "Host" in headers else 403
    for method, path in (("GET", "/"), ("GET", "/openapi.json"), ("POST", "/predict")):
        status, sent, body = client.ask(method, path, picture() if method == "POST" else None, headers)
        assert status == wanted
        assert b"probabilities" not in body
        assert "access-control-allow-origin" not in sent


@pytest.mark.parametrize(
    "host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST", "[::1]:{port}", "photos.example"]
)
def test_its_own_names_are_not(host: str, client: Client) -> None:
    host = host.format(port=client.address.partition(":")[2])
    headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
    assert client.predict(picture(), headers=headers)[0] == 200
    assert client.ask("OPTIONS", "/predict", headers={"Host": host})[0] == 405


def test_too_many_at_once_are_told_to_come_again(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(trained / "run", queue=2) as (client, result):
        assert client.predict(picture())[0] == 200
        with client.hold(picture()) as first, client.hold(picture(1)) as second:
            _, headers, body = until(lambda: client.ask("POST", "/predict", picture()), 503)
            assert int(headers["retry-after"]) >= 1
            assert json.loads(body)["error"]["reason"] == "busy"
            assert client.ask()[0] == 200, "the page is still shown"
            for held, seed in ((first, 0), (second, 1)):
                held.sendall(picture(seed)[-1:])
                assert held.recv(20).startswith(b"HTTP/1.1 200")
        assert client.predict(picture())[0] == 200
        # Who leaves in the middle gives the place back, and so does who never ends
        for held in (client.hold(picture()), client.hold(picture())):
            held.close()
        until(lambda: client.predict(picture()), 200)
        monkeypatch.setattr(app, "_BODY_SECONDS", 0.2)
        with client.hold(picture()) as first, client.hold(picture()) as second:
            assert first.recv(20).startswith(b"HTTP/1.1 408")
            assert second.recv(20).startswith(b"HTTP/1.1 408")
            assert client.predict(picture())[0] == 200
    assert result["num_refused"] >= 1


def until(ask: Callable[[], tuple], status: int) -> tuple:
    """Asks again and again, until this is the answer: what another connection does is heard of a little later."""
    for _ in range(500):
        if (answer := ask())[0] == status:
            return answer
        time.sleep(0.01)
    raise AssertionError(f"{answer} where {status} was to come")


def test_no_such_page(client: Client) -> None:
    assert client.ask(path="/nothing")[0] == 404
    assert client.ask("DELETE", "/predict")[0] == 405
    assert client.ask(path="/../../etc/passwd")[0] == 404


# What it says of itself


def test_the_page_may_load_nothing_but_itself(client: Client) -> None:
    status, headers, body = client.ask()
    assert status == 200
    page = body.decode()
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["img-src"] == "data:"
    assert "unsafe" not in headers["content-security-policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["script-src"] == f"'sha256-{digest}'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert "server" not in headers
    assert re.findall(r"(?:src|href)=\"([^\"]*)\"", page) == ["data:,", "/openapi.json"]


def test_the_description_is_valid_and_holds(client: Client, trained: Path) -> None:
    described = json.loads(client.ask(path="/openapi.json")[2])
    validate(described)
    answers = [
        client.predict((trained / "images" / "train" / "red" / "000.png").read_bytes()),
        client.predict(picture(), path="/predict?thumbnails=true"),
        client.predict(b"no image"),
        client.predict(bytes(200_001)),
        client.predict(form()[0], headers=form()[1]),
        client.predict(picture(), headers={"Origin": "http://evil.example"}),
        client.predict(picture(), headers={"Host": "evil.example"}),
    ]
    assert [status for status, _ in answers] == [200, 200, 422, 413, 400, 403, 421]
    for status, answer in answers:
        assert_described(described, status, answer)
        with pytest.raises(jsonschema.ValidationError):
            assert_described(described, status, {})


def assert_described(described: dict[str, Any], status: int, answer: dict[str, Any]) -> None:
    """An answer is what the description says of its status."""
    response = described["paths"]["/predict"]["post"]["responses"][str(status)]
    schema = response["content"]["application/json"]["schema"]
    jsonschema.validate(answer, {**schema, "components": described["components"]})


# The command


def command(*arguments: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "probe.cli", "serve", *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_sigterm_ends_it_when_what_is_under_way_is_answered(trained: Path) -> None:
    with command(trained / "run", "--port", 0, "--json") as process:
        client = Client(json.loads(process.stdout.readline())["url"])
        assert client.predict(picture())[0] == 200
        with client.hold(picture(1)) as held, client.hold(picture(2)) as other:
            assert client.predict(picture(3))[0] == 200
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(ConnectionRefusedError):
                while True:  # until it takes no more
                    socket.create_connection(client.address.split(":")).close()
                    time.sleep(0.02)
            assert process.poll() is None
            for one, seed in ((held, 1), (other, 2)):
                one.sendall(picture(seed)[-1:])
                assert one.recv(20).startswith(b"HTTP/1.1 200")
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    total = json.loads(out)
    assert (total["url"], total["num_images"], total["num_refused"]) == (client.url, 4, 0)
    assert "stopping: finishing the requests under way" in err
    assert "Traceback" not in err


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_the_commands_of_the_readme(trained: Path, tmp_path: Path) -> None:
    """As printed, with another port; Ctrl-C ends it."""
    section = (Path(__file__).parents[1] / "README.md").read_text().split("\n## A page to drop images on\n")[1]
    start, ask = re.findall(r"```\n(.*?)\n```", section, re.DOTALL)[:2]
    install, start = start.splitlines()
    assert install == "pip install 'probe-jax[serve]'"
    assert start == "probe serve run"
    (tmp_path / "photo.jpg").write_bytes(picture(kind="JPEG"))
    with command(trained / "run", "--port", 0) as process:
        url = process.stdout.readline().strip()
        assert "http://127.0.0.1:8765/predict" in ask
        words = shlex.split(ask.replace("http://127.0.0.1:8765/", url))
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert set(json.loads(done.stdout)["probabilities"]) == {"blue", "green", "red"}
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert out == "answered 1 (steps 1), refused 0\n"


def test_a_port_in_use_is_said_before_anything_is_loaded(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "nowhere", "--port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 is in use: give another --port, or --port 0" in capsys.readouterr().err
    assert main(["serve", "nowhere", "--port", "0", "--host", "192.0.2.1"]) == 2
    assert "give an address of this machine" in capsys.readouterr().err
    assert main(["serve", "nowhere", "--port", "0"]) == 3
    assert "nowhere: not found" in capsys.readouterr().err


def test_who_listens_everywhere_must_say_by_what_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "run", "--host", "0.0.0.0"]) == 2
    assert "--allow-host" in capsys.readouterr().err


def test_what_is_not_installed_is_said(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "probe.serving.app")
    monkeypatch.delattr("probe.serving.app")
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(ConfigError, match=r"pip install 'probe-jax\[serve\]'"):
        serve(ServeConfig(run=trained / "run", port=0))


def test_without_its_cache_a_run_answers_without_neighbours(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained / "run", tmp_path / "run")
    made = json.loads((run / "made.json").read_text())
    manifest = json.loads((run / "manifest.json").read_text())
    made["cache"]["path"] = str(tmp_path / "gone")
    (run / "made.json").write_text(json.dumps(made))
    manifest["made.json"] = hashlib.sha256((run / "made.json").read_bytes()).hexdigest()
    (run / "manifest.json").write_text(json.dumps(manifest))
    with serving(run) as (client, _):
        assert client.predict(picture())[1]["nearest"] == []
        assert "The nearest training images are not known" in client.ask()[2].decode()
    with pytest.raises(InputError, match="is not a cache"), serving(run, cache=tmp_path / "gone"):
        pass
    with serving(run, cache=trained / "cache", images=tmp_path) as (client, _):
        assert len(client.predict(picture(), path="/predict?thumbnails=1")[1]["nearest"]) == 6
        assert "Training images have no picture" in client.ask()[2].decode()


# Batches


@settings(max_examples=60, deadline=None)
@given(
    delays=st.lists(st.integers(0, 4), min_size=1, max_size=25),
    batch_size=st.integers(1, 6),
    bad=st.integers(0, 30),
    leaver=st.integers(0, 30),
)
def test_each_gets_its_own_result_and_no_batch_is_too_large(
    delays: list[int], batch_size: int, bad: int, leaver: int
) -> None:
    """One item makes its batch fail, and one caller leaves: nobody else's result is touched."""
    batches: list[list[int]] = []
    room = Room(100)

    def double(items: list[int]) -> list[int]:
        batches.append(items)
        time.sleep(0.0005)
        if bad in items:
            raise ValueError("this batch")
        return [2 * item for item in items]

    async def run() -> list[Any]:
        batcher = Batcher(double, batch_size=batch_size, wait_s=0.002, num_expected=lambda: room.num_inside)

        async def ask(item: int, delay: int) -> int:
            await asyncio.sleep(delay / 2000)
            with room.place():
                return await batcher(item)

        async with batcher.running():
            tasks = [asyncio.create_task(ask(item, delay)) for item, delay in enumerate(delays)]
            if leaver < len(tasks):
                await asyncio.sleep(0.001)
                tasks[leaver].cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(run())
    assert max(map(len, batches), default=0) <= batch_size
    seen = [item for batch in batches for item in batch]
    assert len(seen) == len(set(seen))
    assert set(range(len(delays))) - set(seen) <= {leaver}
    failed = next((set(batch) for batch in batches if bad in batch), set())
    for item, result in enumerate(results):
        if isinstance(result, asyncio.CancelledError):
            assert item == leaver
        elif item in failed:
            assert isinstance(result, ValueError)
        else:
            assert result == 2 * item
    assert room.num_inside == 0


def test_a_room_has_so_many_places() -> None:
    room = Room(2)
    with room.place(), room.place():
        with pytest.raises(BusyError) as refused, room.place(lambda: 1.7):
            pass
        assert refused.value.retry_after_s == 4
    with room.place():
        assert (room.num_inside, room.num_refused) == (1, 1)


def test_who_is_alone_does_not_wait_for_others() -> None:
    """A batch waits for nobody who is not on the way: with an hour to wait, it would take that."""
    room = Room(9)

    async def run() -> int:
        batcher = Batcher(lambda items: items, batch_size=4, wait_s=3600, num_expected=lambda: room.num_inside)
        async with batcher.running():
            with room.place():
                return await asyncio.wait_for(batcher(5), 30)

    assert asyncio.run(run()) == 5


def test_the_bundle_says_what_was_seen(trained: Path) -> None:
    """What the page calls trained on: train, and nothing of test."""
    seen = bundle.load(trained / "run").seen
    keys = {split: {hashlib.sha256(p.read_bytes()).digest() for p in (trained / "images" / split).rglob("*.png")}
            for split in ("train", "test")}  # fmt: skip
    assert seen == keys["train"]
    assert seen.isdisjoint(keys["test"])
