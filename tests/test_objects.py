"""Images and caches on an object store, over HTTP: what moto's server on this machine understands of S3.

pytest -m cluster tests/test_objects.py
"""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from probe.cache import Cache
from probe.cli import main
from probe.errors import ConfigError, InputError, StorageError
from probe.sources import open_source
from probe.storage import atomic_write_bytes, locate
from tests.faults import files_of

pytest.importorskip("moto", reason="moto is not installed: pip install 'probe-jax[test,remote]' 'moto[server]'")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("default"),
]  # of libraries below

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a bucket; the environment says where its server is."""
    log = tmp_path_factory.mktemp("store") / "log"
    with log.open("wb") as file:
        script = "from moto.server import main; main(['-H', '127.0.0.1', '-p', '0'])"
        server = subprocess.Popen([sys.executable, "-c", script], stdout=file, stderr=file)
    while (found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text())) is None:
        assert server.poll() is None, log.read_text()
        time.sleep(0.1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", found[1])
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "of-no-use-elsewhere")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        locate("s3://bucket").fs.mkdir("bucket")  # type: ignore[attr-defined]
        yield "s3://bucket"
    server.terminate()
    server.wait()


@pytest.fixture
def images(store: str, image_folder: Path, tmp_path: Path) -> str:
    """The image folder, uploaded."""
    address = f"{store}/{tmp_path.name}/images"
    for path in image_folder.rglob("*.png"):
        atomic_write_bytes(locate(f"{address}/{path.relative_to(image_folder)}"), path.read_bytes())
    return address


def objects_below(address: str) -> dict[str, bytes]:
    root = locate(address)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("**/*") if path.is_file()}


def test_a_cache_on_a_store_is_made_of_the_same_objects_and_continues(
    store: str, images: str, image_folder: Path, tiny_clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--backbone", str(tiny_clip), "--batch-size", "8", "--shard-rows", "16", "--num-workers", "1", "--json"]
    there, here = f"{store}/{tmp_path.name}/cache", tmp_path / "cache"
    assert main(["embed", str(image_folder), "--out", there, *options]) == 0
    assert main(["embed", str(image_folder), "--out", str(here), *options]) == 0
    assert objects_below(there) == files_of(here)
    for path in locate(there).glob("shards/*/*-00001-*.json"):
        path.unlink()  # a shard without its sidecar does not count
    for path in locate(there).glob("plan/000001-*.h5"):
        path.unlink()
    capfd.readouterr()
    assert main(["embed", str(image_folder), "--out", there, *options]) == 0
    assert json.loads(capfd.readouterr().out)["num_computed"] == 16
    assert objects_below(there) == files_of(here)
    assert main(["cache", "verify", there]) == 0
    assert main(["fit-linear", there, "--out", str(tmp_path / "run")]) == 0
    assert main(["fit-linear", there, "--out", f"{store}/run"]) == 3
    assert "a folder of this machine" in capfd.readouterr().err


def test_images_on_a_store_give_the_embeddings_of_those_here(
    images: str, image_folder: Path, tiny_clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--backbone", str(tiny_clip), "--batch-size", "8", "--num-workers", "1", "--json"]
    there, here = tmp_path / "there", tmp_path / "here"
    assert main(["embed", images, "--out", str(there), *options]) == 0
    assert main(["embed", str(image_folder), "--out", str(here), *options]) == 0
    ours, theirs = Cache.open(there), Cache.open(here)
    assert list(ours.table.names) == list(theirs.table.names)
    assert (ours.table.labels == theirs.table.labels).all()
    assert (ours.table.splits == theirs.table.splits).all()
    assert (ours.embeddings() == theirs.embeddings()).all()
    capfd.readouterr()
    assert main(["embed", images, "--out", str(there), *options]) == 0
    assert json.loads(capfd.readouterr().out)["num_computed"] == 0, "sizes and times are known"


@pytest.mark.timeout(600)
def test_a_killed_run_on_a_store_goes_on_to_the_same_objects(
    store: str, image_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    for path in sorted(image_folder.rglob("*.png")):
        for copy in range(4):
            (path.parent / f"{path.stem}-{copy}.png").write_bytes(path.read_bytes() + b"%d" % copy)
    options = ["--backbone", str(tiny_clip), "--batch-size", "8", "--shard-rows", "8", "--num-workers", "1"]
    there, here = f"{store}/{tmp_path.name}/killed", tmp_path / "here"
    command = [str(Path(sys.executable).parent / "probe"), "embed", str(image_folder), *options, "--out"]
    running = subprocess.Popen([*command, there], cwd=ROOT, stderr=subprocess.DEVNULL)
    while running.poll() is None and len(list(locate(there).glob("shards/*/*.json"))) < 3:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = objects_below(there)
    assert not any(name.endswith(".h5") and "plan/000001" in name for name in before), "killed too late"
    assert main(["embed", str(image_folder), *options, "--out", there]) == 0
    assert main(["embed", str(image_folder), *options, "--out", str(here)]) == 0
    after = objects_below(there)
    assert after == files_of(here)
    assert before.items() <= after.items()


def test_what_a_store_refuses_is_told(store: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/x: cannot write 3 bytes: .*bucket"):
        atomic_write_bytes(locate("s3://no-such-bucket/x"), b"abc")
    with pytest.raises(ConfigError, match=r"nonsense://x: .*probe-jax\[remote\]"):
        locate("nonsense://x")
    with pytest.raises(InputError, match="there is nothing below this address"):
        open_source(locate(f"{store}/empty"))
