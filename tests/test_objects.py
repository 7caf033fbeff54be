"""Images and caches on an object store, over HTTP: what moto's server on this machine understands of S3.

pytest -m cluster tests/test_objects.py
"""

import dataclasses
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from probe.cache import Cache
from probe.cli import main
from probe.errors import ConfigError, InputError, StorageError
from probe.images import ImageError
from probe.sources import Source, open_source
from probe.storage import atomic_write_bytes, locate
from tests.faults import files_of
from tests.test_readme import readme_commands

pytest.importorskip("moto", reason="moto is not installed: pip install 'probe-jax[test,remote]' 'moto[server]'")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("default"),
]  # of libraries below

ROOT = Path(__file__).parents[1]
MADE = ["--batch-size", "8", "--precision", "float32", "--num-workers", "1"]  # not what is fastest here today


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
    options = ["--backbone", str(tiny_clip), *MADE, "--shard-rows", "16", "--json"]
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
    assert main(["predict", f"{store}/run", str(image_folder)]) == 3
    assert "a run folder is read from this machine" in capfd.readouterr().err


def test_the_commands_of_the_readme(
    store: str, image_folder: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As printed; the bucket is that of the server here."""
    monkeypatch.chdir(tmp_path)
    for path in image_folder.rglob("*.png"):
        atomic_write_bytes(locate(f"{store}/photos/{path.relative_to(image_folder)}"), path.read_bytes())
    embed, fit = [command for command in readme_commands() if "s3://bucket/" in command and "…" not in command]
    assert main(shlex.split(embed.replace("--backbone B", f"--backbone {tiny_clip}"))[1:]) == 0
    assert main(shlex.split(fit)[1:]) == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_images_on_a_store_give_the_embeddings_of_those_here(
    images: str, image_folder: Path, tiny_clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--backbone", str(tiny_clip), *MADE, "--json"]
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


def upload(address: str, path: Path) -> Path:
    """A file, as an object of the same name."""
    there = locate(f"{address}/{path.name}")
    atomic_write_bytes(there, path.read_bytes())
    return there


def assert_same_source(there: Source, here: Source) -> None:
    """The same images with the same labels, in this process and as another host opens them."""
    assert [dataclasses.replace(e, mtime_ns=0) for e in there.examples] == [
        dataclasses.replace(e, mtime_ns=0) for e in here.examples
    ]
    assert there.class_names == here.class_names
    assert there.ignored == here.ignored
    wanted = [(example.name, here.read(example)) for example in here.examples]
    assert [(example.name, there.read(example)) for example in there.examples] == wanted
    opener = there.opener()
    if opener is not None:
        elsewhere = pickle.loads(pickle.dumps(opener))()
        content = [(example.name, data) for example, data in elsewhere.iter_bytes(there.examples[1:])]
        assert content == wanted[1:]


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tars", "zip", "parquet"])
def test_archives_on_a_store_are_read_where_they_are(kind: str, store: str, image_folder: Path, tmp_path: Path) -> None:
    here, address = tmp_path / "archives", f"{store}/{tmp_path.name}"
    here.mkdir()
    files = sorted(path for path in image_folder.rglob("*.png"))
    names = [str(path.relative_to(image_folder)) for path in files]
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = {"image": [path.read_bytes() for path in files], "label": [path.parent.name for path in files]}
        parquet.write_table(pyarrow.table(columns), here / "train.parquet", row_group_size=10)
    elif kind == "zip":
        with zipfile.ZipFile(here / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path, name in zip(files, names, strict=True):
                archive.write(path, name)
    else:
        suffix = "tar.gz" if kind == "tar.gz" else "tar"
        for number in range(2 if kind == "tars" else 1):
            with tarfile.open(here / f"train-{number}.{suffix}", "w:gz" if kind == "tar.gz" else "w") as archive:
                for path, name in list(zip(files, names, strict=True))[number::2]:
                    key = name.removesuffix(".png").replace("/", "-")
                    archive.add(path, f"{key}.png")
                    (tmp_path / "label").write_text(path.parent.name)
                    archive.add(tmp_path / "label", f"{key}.cls")
    for path in here.iterdir():
        there: Path = upload(f"{address}/archives", path)
    if kind == "tars":
        there, path = there.parent, here
    assert_same_source(open_source(there), open_source(path))


def test_an_archive_that_is_written_again_gives_no_other_bytes(store: str, image_folder: Path, tmp_path: Path) -> None:
    paths = sorted(image_folder.rglob("*.png"))
    for number, order in enumerate((paths, paths[::-1])):
        (tmp_path / str(number)).mkdir()
        with tarfile.open(tmp_path / str(number) / "x.tar", "w") as archive:
            for path in order:
                archive.add(path, str(path.relative_to(image_folder)))
    address = f"{store}/{tmp_path.name}"
    source = open_source(upload(address, tmp_path / "0" / "x.tar"))
    first, second, *_ = source.examples
    assert source.read(first) == (image_folder / os.fsdecode(first.name)).read_bytes()
    time.sleep(1.1)  # a store tells the time of writing in seconds
    upload(address, tmp_path / "1" / "x.tar")
    opener = source.opener()
    assert opener is not None
    with pytest.raises(ImageError, match="was written to after it was listed"):
        opener().read(second)


def test_manifests_name_objects(
    store: str, images: str, image_folder: Path, tiny_clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = [str(path.relative_to(image_folder)) for path in sorted(image_folder.rglob("*.png"))]

    def write(file: str, prefix: str, folder: Path = tmp_path) -> Path:
        rows = [f'"{prefix}{name}",{name.split("/")[1]},{name.split("/")[0]}\n' for name in names]
        (folder / file).write_text("path,label,split\n" + "".join(rows))
        return folder / file

    local = open_source(write("local.csv", "", image_folder))
    assert_same_source(open_source(upload(images, image_folder / "local.csv")), local)
    assert_same_source(open_source(write("rooted.csv", ""), image_root=locate(images)), local)
    up = open_source(upload(f"{images}/tables", write("up.csv", "../")))
    addressed = open_source(write("addressed.csv", f"{images}/"))
    for source, prefix in ((up, "../"), (addressed, f"{images}/")):
        assert [e.name for e in source.examples] == [os.fsencode(prefix + name) for name in names]
        assert [source.read(e) for e in source.examples] == [local.read(e) for e in local.examples]
        assert [e.labels for e in source.examples] == [e.labels for e in local.examples]

    options = ["--backbone", str(tiny_clip), *MADE]
    there, here = tmp_path / "there", tmp_path / "here"
    assert main(["embed", f"{images}/local.csv", "--out", str(there), *options]) == 0
    assert main(["embed", str(image_folder / "local.csv"), "--out", str(here), *options]) == 0
    ours, theirs = Cache.open(there), Cache.open(here)
    assert (ours.embeddings() == theirs.embeddings()).all()
    assert (ours.table.labels == theirs.table.labels).all()
    capfd.readouterr()
    assert main(["embed", f"{images}/local.csv", "--out", str(there), *options, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["num_computed"] == 0


def test_what_a_manifest_of_objects_says_wrong_is_listed(store: str, images: str, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    name = "train/red/000.png"
    table.write_text(f"path,label\n{images}/{name},a\n{images}/none.png,a\n{name},b\ngs://bucket/{name},b\n")
    with pytest.raises(InputError) as caught:
        open_source(table)
    for told in (
        f"line 3: there is no object {images}/none.png",
        f"line 4: {name} is a path, and other rows name addresses: say by --image-root s3://...",
        f"line 5: gs://bucket/{name} is not on the store s3://, as the others are",
    ):
        assert told in str(caught.value)
    table.write_text(f"path,label\n{images}/{name},a\n{name},a\n")
    with pytest.raises(InputError, match=f"line 3: {name} is the object {images}/{name} again"):
        open_source(table, image_root=locate(images))


def test_many_objects_of_one_folder_are_listed_together(store: str, image_folder: Path, tmp_path: Path) -> None:
    """And brackets in names are no patterns."""
    data = next(image_folder.rglob("*.png")).read_bytes()
    address = f"{store}/{tmp_path.name}/many"
    names = [f"a/picture [{number}].png" for number in range(120)]
    with ThreadPoolExecutor(8) as uploading:
        list(uploading.map(lambda name: atomic_write_bytes(locate(f"{address}/{name}"), data + name.encode()), names))
    table = tmp_path / "table.csv"
    table.write_text("path,label\n" + "".join(f"{name},{number % 2}\n" for number, name in enumerate(names[1:])))
    source = open_source(table, image_root=locate(address))
    assert {os.fsdecode(e.name): source.read(e) for e in source.examples} == {
        name: data + name.encode() for name in names[1:]
    }


@pytest.mark.timeout(600)
def test_a_killed_run_on_a_store_goes_on_to_the_same_objects(
    store: str, image_folder: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    for path in sorted(image_folder.rglob("*.png")):
        for copy in range(4):
            (path.parent / f"{path.stem}-{copy}.png").write_bytes(path.read_bytes() + b"%d" % copy)
    options = ["--backbone", str(tiny_clip), *MADE, "--shard-rows", "8"]
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
