"""Checkpoints by hub id, against a small server that speaks the hub's protocol, with the real client.

The client reads its settings from the environment when it is imported, so it runs in a process of its own.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from probe.backbones import load_backbone
from tests.golden.cases import FLAX

COMMIT = hashlib.sha1(b"main").hexdigest()
SCRIPT = """
import json, sys
from probe.backbones import load_backbone
from probe.errors import InputError
for name, revision in json.loads(sys.argv[1]):
    try:
        backbone = load_backbone(name, revision=revision)
        print(json.dumps([backbone.name, backbone.revision, backbone.fingerprint]))
    except InputError as err:
        print(json.dumps(str(err)))
"""


class Hub(ThreadingHTTPServer):
    """Repositories {id: {file name: content}}, each with one commit that `main` and the tag v1 stand for."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories = repositories
        self.downloads: list[str] = []


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        is_api = path.startswith("/api/models/")
        owner, name, kind, *rest = [*path.removeprefix("/api/models").strip("/").split("/"), "", ""]
        files = self.server.repositories.get(f"{owner}/{name}")
        if files is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if kind and rest[0] not in ("main", "v1", COMMIT):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if is_api and kind == "tree":
            entries = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in files.items()
            ]
            return self.answer(200, json.dumps(entries).encode())
        if is_api:
            info = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
            return self.answer(200, json.dumps(info).encode())
        file = "/".join(part for part in rest[1:] if part)
        if file not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.server.downloads.append(f"{owner}/{name}/{file}")
        tag = hashlib.sha1(files[file]).hexdigest()
        return self.answer(200, files[file], {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub(tiny_clip: Path) -> Iterator[Hub]:
    safe, flax = files_of(tiny_clip), files_of(FLAX / "clip")
    configs = {name: data for name, data in safe.items() if name.endswith(".json")}
    pickled = {"pytorch_model.bin": b"\x80\x04", "tf_model.h5": b"", "vocab.json": b"{}"}
    repositories = {"tiny/clip": flax | pickled | safe, "tiny/flax": flax | pickled, "tiny/pickled": configs | pickled}
    server = Hub(repositories)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def load_all(names: list[tuple[str, str | None]], cache: Path, **settings: str) -> list:
    """What `load_backbone` gives for each (name, revision), in a process with the hub cache in `cache`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "JAX_PLATFORMS": "cpu", **settings}
    command = [sys.executable, "-c", SCRIPT, json.dumps(names)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_hub_id_is_loaded_and_then_found_offline(hub: Hub, tiny_clip: Path, tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    local, from_flax = load_backbone(tiny_clip).fingerprint, load_backbone(FLAX / "clip").fingerprint
    names = [("tiny/clip", None), ("tiny/clip@v1", None), ("tiny/clip", COMMIT), ("tiny/flax", None)]
    found = load_all(
        [*names, ("tiny/pickled", None), ("tiny/absent", None), ("tiny/clip@v2", None)],
        tmp_path,
        HF_ENDPOINT=endpoint,
    )
    assert found[:3] == [["tiny/clip", COMMIT, local]] * 3
    assert found[3] == ["tiny/flax", COMMIT, from_flax]
    pickled, absent, no_revision = found[4:]
    assert f"tiny/pickled at {COMMIT}: has neither safetensors nor flax_model.msgpack" in pickled
    assert "Pickled weights (.bin) are not read" in pickled
    assert "tiny/absent: the hub has no such model, or it is private or gated" in absent
    assert "tiny/clip: the hub has no revision 'v2' of it" in no_revision
    # only what is needed travels, once, and of two kinds of weights the safer
    expected = {"config.json", "preprocessor_config.json"}
    assert sorted(hub.downloads) == sorted(
        [f"tiny/clip/{name}" for name in expected | {"model.safetensors"}]
        + [f"tiny/flax/{name}" for name in expected | {"flax_model.msgpack"}]
        + [f"tiny/pickled/{name}" for name in expected]
    )

    offline = load_all([*names, ("tiny/other", None)], tmp_path, HF_HUB_OFFLINE="1")
    assert offline[:4] == found[:4]
    assert offline[4].startswith("tiny/other: it is not whole in the local hub cache (")
    assert "give the folder of a copy in place of the id" in offline[4]

    unreachable = load_all([("tiny/clip", None), ("tiny/other", None)], tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert unreachable == [found[0], offline[4]]
