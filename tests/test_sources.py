"""Where examples come from: folders, manifests, archives and tables, good, odd and contradictory."""

import contextlib
import csv
import io
import json
import os
import socket
import struct
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from probe.errors import InputError
from probe.images import ImageError, Preprocessing, load_images
from probe.sources import Columns, Example, Source, check_labels, display_name, open_source
from probe.sources.source import split_in_name

pa = pytest.importorskip("pyarrow", reason="needs the extra `parquet`")
pq = pytest.importorskip("pyarrow.parquet")


def picture(seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(root: Path, *names: str | bytes) -> Path:
    """Writes files whose content is their own name; a name with a slash at its end is a folder."""
    for name in map(os.fsencode, names):
        path = root / os.fsdecode(name)
        (path if name.endswith(b"/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith(b"/"):
            path.write_bytes(name)
    return root


def summary(source: Source) -> dict[str, tuple[str | None, ...]]:
    """name -> (split, labels ...)"""
    return {os.fsdecode(e.name): (e.split, *e.labels) for e in source.examples}


def read_all(source: Source) -> dict[bytes, bytes | str]:
    """name -> bytes, or the reason that there are none; as `load_images` would be given them."""
    contents: dict[bytes, bytes | str] = {}
    for example, content in source.iter_bytes(source.examples):
        if isinstance(content, ImageError):
            contents[example.name] = content.reason
        else:
            contents[example.name] = content.read_bytes() if isinstance(content, Path) else content
            assert contents[example.name] == source.read(example)
    return contents


# folders


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (("cat/1.jpg", "dog/1.jpg"), {"cat/1.jpg": (None, "cat"), "dog/1.jpg": (None, "dog")}),
        (("cat/x/y/1.jpg", "dog/1.PNG"), {"cat/x/y/1.jpg": (None, "cat"), "dog/1.PNG": (None, "dog")}),
        (("train/a/1.jpg", "test/a/2.jpg"), {"test/a/2.jpg": ("test", "a"), "train/a/1.jpg": ("train", "a")}),
        (("Train/a/1.jpg", "valid/a/2.jpg"), {"Train/a/1.jpg": ("train", "a"), "valid/a/2.jpg": ("val", "a")}),
        (("validation/a/1.jpg",), {"validation/a/1.jpg": ("val", "a")}),
        (("1.jpg", "2.webp"), {"1.jpg": (None,), "2.webp": (None,)}),
        (("train/1.jpg", "test/2.jpg"), {"test/2.jpg": ("test",), "train/1.jpg": ("train",)}),
        (("train/1.jpg", "bus/1.jpg"), {"bus/1.jpg": (None, "bus"), "train/1.jpg": (None, "train")}),
        (("a/1.jpg", "b/", ".c/1.jpg", "a/.1.jpg", "@eaDir/1.jpg"), {"a/1.jpg": (None, "a")}),
        (("a/1.jpg", "a/README.txt", "a/Thumbs.db", "notes"), {"a/1.jpg": (None, "a")}),
        (("a/x.jpg/1.jpg", "b/1.jpg"), {"a/x.jpg/1.jpg": (None, "a"), "b/1.jpg": (None, "b")}),
        (("a/1.jpg.txt", "a/2.jpg"), {"a/2.jpg": (None, "a")}),
    ],
)
def test_folder_layouts(tmp_path: Path, files: tuple[str, ...], expected: dict[str, Any]) -> None:
    source = open_source(write(tmp_path, *files))
    assert summary(source) == expected
    assert list(summary(source)) == sorted(expected)
    assert source.class_names == tuple(sorted({label for _, *labels in expected.values() for label in labels}))
    assert not source.multi_label
    assert read_all(source) == {name.encode(): name.encode() for name in expected}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("a/",), "no images found"),
        (("a/1.txt", "a/2.txt", "b/x", ".h"), r"left out: 1 without extension, 2 .txt, .*1 hidden"),
        (("0.jpg", "a/1.jpg"), r"images in no class folder \(0.jpg\) beside the folders a"),
        (("train/a/1.jpg", "train/0.jpg"), r"in no class folder \(train/0.jpg\) beside class folders in train"),
        (("train/a/1.jpg", "test/2.jpg"), "class folders in train, but none in test"),
        (("train/a/1.jpg", "extra/a/1.jpg"), "train look like splits .* beside them are extra"),
        (("val/a/1.jpg", "validation/a/1.jpg"), "two folders for one split: val, validation"),
        ((b"caf\xe9/1.jpg", "b/1.jpg"), r"class names that are not UTF-8: caf\\xe9. Rename them"),
    ],
)
def test_ambiguous_folders(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(write(tmp_path, *files))


def test_unlabelled_folders_may_have_any_shape(tmp_path: Path) -> None:
    source = open_source(write(tmp_path, "0.jpg", "a/1.jpg", "train/a/b/2.jpg", b"caf\xe9/3.jpg"), labelled=False)
    assert [e.name for e in source.examples] == [b"0.jpg", b"a/1.jpg", b"caf\xe9/3.jpg", b"train/a/b/2.jpg"]
    assert {(e.labels, e.split) for e in source.examples} == {((), None)}
    assert source.class_names == ()


def test_a_single_image(tmp_path: Path) -> None:
    path = write(tmp_path, "one.jpg") / "one.jpg"
    source = open_source(path, labelled=False)
    assert [source.path(example) for example in source.examples] == [path]
    with pytest.raises(InputError, match="single image"):
        open_source(path)


@pytest.mark.parametrize(("name", "message"), [("nowhere", "does not exist"), ("a.doc", "where a folder of images is")])
def test_paths_that_are_no_source(tmp_path: Path, name: str, message: str) -> None:
    write(tmp_path, "a.doc")
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / name)
    with pytest.raises(InputError, match="neither file nor folder"):
        open_source(Path("/dev/null"))


ODD_NAMES = [
    b"\xff\xfe\x80.jpg",
    "é.jpg".encode(),
    "e\u0301.jpg".encode(),  # the same to the eye
    b"line\nend.jpg",
    b"tab\there.jpg",
    b"\x1b[31mred.jpg",
    "\u202egpj.exe.jpg".encode(),
    b"-rf.jpg",
    b"--help.jpg",
    b"=cmd.jpg",
    b"<img onerror>.jpg",
    b" .jpg",
    b"back\\slash.jpg",
    b"\x01.jpg",
    b"%s{0}$HOME`id`.jpg",
    b"con.jpg",
    b"n" * 251 + b".jpg",
]


def test_names_are_opaque_bytes(tmp_path: Path) -> None:
    write(tmp_path, *(b"class/" + name for name in ODD_NAMES))
    source = open_source(tmp_path)
    assert [e.name for e in source.examples] == sorted(b"class/" + name for name in ODD_NAMES)
    assert read_all(source) == {e.name: e.name for e in source.examples}
    shown = [display_name(e.name) for e in source.examples]
    assert all(name.isprintable() for name in shown)
    assert len(set(shown)) == len(shown)
    preprocessing = Preprocessing.from_config({"image_processor_type": "ViTImageProcessor", "size": 8})
    images = list(load_images(source.iter_bytes(source.examples), preprocessing, num_workers=1))
    assert [image.failure.reason for image in images if image.failure] == ["format"] * len(ODD_NAMES)  # found, all


@given(st.binary(max_size=30), st.binary(max_size=30))
def test_displayed_names_are_safe_and_different(one: bytes, other: bytes) -> None:
    assert display_name(one).isprintable()
    assert (display_name(one) == display_name(other)) == (one == other)


@given(st.text(max_size=20))
def test_displayed_text_is_safe(text: str) -> None:
    assert display_name(text).isprintable()
    display_name(text).encode()


def test_special_files_are_listed_and_fail_by_themselves(tmp_path: Path) -> None:
    write(tmp_path, "a/good.jpg", "b/good.jpg", "elsewhere.txt")
    os.mkfifo(tmp_path / "a/fifo.jpg")
    with contextlib.chdir(tmp_path / "a"), socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")
    (tmp_path / "a/device.jpg").symlink_to("/dev/zero")
    (tmp_path / "a/dangling.jpg").symlink_to("nowhere")
    (tmp_path / "a/self.jpg").symlink_to("self.jpg")
    (tmp_path / "a/link.jpg").symlink_to("../b/good.jpg")
    source = open_source(tmp_path)
    assert {e.name: e.size for e in source.examples if e.size} == dict.fromkeys(
        (b"a/good.jpg", b"a/link.jpg", b"b/good.jpg"), 10
    )
    reasons = {}
    for example in source.examples:
        try:
            source.read(example)
        except ImageError as err:
            reasons[example.name] = err.reason
    assert reasons == {
        b"a/fifo.jpg": "not-a-file",
        b"a/socket.jpg": "not-a-file",
        b"a/device.jpg": "not-a-file",
        b"a/dangling.jpg": "missing",
        b"a/self.jpg": "unreadable",
    }


def test_links_to_folders(tmp_path: Path) -> None:
    """Followed, as torchvision does, but never round in a circle, and each folder once per class."""
    write(tmp_path, "root/cat/x/1.jpg", "root/dog/2.jpg", "far/3.jpg")
    (tmp_path / "root/bird").symlink_to(tmp_path / "far")
    (tmp_path / "root/cat/up").symlink_to("..")
    (tmp_path / "root/cat/self").symlink_to(".")
    (tmp_path / "root/cat/a_second_x").symlink_to("x")
    (tmp_path / "root/dog/nowhere").symlink_to("nowhere")
    source = open_source(tmp_path / "root")
    assert summary(source) == {"bird/3.jpg": (None, "bird"), "cat/x/1.jpg": (None, "cat"), "dog/2.jpg": (None, "dog")}


def test_folders_all_linked_with_each_other(tmp_path: Path) -> None:
    """12 folders, each with links to all: a walk along all paths would not end before the sun does."""
    names = [f"{i:02d}" for i in range(12)]
    write(tmp_path, *(f"{name}/{name}.jpg" for name in names))
    for name in names:
        for other in names:
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    started = time.monotonic()
    source = open_source(tmp_path)
    assert len(source.examples) == 12 * 12
    assert time.monotonic() - started < 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, "a/1.jpg", "b/1.jpg", "c/1.jpg")
    (tmp_path / "b").chmod(0)
    try:
        with pytest.raises(InputError, match=r"folders that cannot be read: b \(Permission denied\)"):
            open_source(tmp_path)
    finally:
        (tmp_path / "b").chmod(0o755)


# labels


def labelled(*rows: tuple[str | None, str]) -> Source:
    class Fixed(Source):
        def read(self, example: Example) -> bytes:
            return b""

    examples = [
        Example(b"%d" % i, (label,) if label else (), split, None, 0, 0)  # type: ignore[arg-type]
        for i, (split, label) in enumerate(rows)
    ]
    return Fixed(Path("images"), examples)


def test_labels_that_can_be_learned() -> None:
    check_labels(labelled((None, "a"), (None, "b")))
    check_labels(labelled(("train", "a"), ("train", "b"), ("test", "a")))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(None, ""), (None, "")], "no labels"),
        ([(None, "a"), (None, "b"), (None, "")], "images without a label: 2"),
        ([(None, "a"), (None, "a")], "one class only, 'a'"),
        ([("test", "a"), ("test", "b")], "no training images, only test"),
        ([("train", "a"), ("train", "b"), ("test", "c")], "classes in test that train lacks: c; train has a, b"),
        ([("train", "a"), ("train", "b"), ("val", "c")], "classes in val that train lacks: c"),
        ([(None, "a b"), (None, "a  b ")], "differ only in spaces"),
        ([(None, "\u00e9"), (None, "e\u0301")], "how they are encoded"),
    ],
)
def test_labels_that_cannot(rows: list[tuple[str | None, str]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_labels(labelled(*rows))


# manifests


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One table in the format that its suffix says."""
    columns = sorted({column for row in rows for column in row})
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist([{c: row.get(c) for c in columns} for row in rows]), path)
    else:
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(columns)
            for row in rows:
                cells = [row.get(column) for column in columns]
                writer.writerow([json.dumps(cell) if isinstance(cell, list) else cell for cell in cells])
    return path


NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..") and len(name.encode()) <= 50
)
LABELS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
    lambda label: not label.startswith("[")
)
ROWS = st.lists(
    st.tuples(NAMES, LABELS, st.sampled_from(["train", "val", "test", None]), st.one_of(st.none(), LABELS)),
    min_size=1,
    max_size=8,
    unique_by=lambda row: row[0],
)


@given(rows=ROWS, suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]))
@settings(max_examples=80, deadline=None)
def test_manifest_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: Any, suffix: str) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    (folder / "images").mkdir()
    table = []
    for name, label, split, group in rows:
        write(folder, f"images/{name}")
        table.append({"path": f"images/{name}", "label": label, "split": split, "group": group})
    source = open_source(write_table(folder / f"manifest{suffix}", table))
    found = {os.fsdecode(e.name): (e.labels, e.split, e.group) for e in source.examples}
    assert found == {f"images/{name}": ((label,), split, group) for name, label, split, group in rows}
    assert [e.name for e in source.examples] == sorted(e.name for e in source.examples)
    assert all(content == name for name, content in read_all(source).items())


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_lists_of_labels(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    rows = [
        {"file_name": "1.jpg", "labels": ["b", "a"]},
        {"file_name": "2.jpg", "labels": ["c"]},
        {"file_name": "3.jpg", "labels": []},
    ]
    source = open_source(write_table(tmp_path / f"m{suffix}", rows))
    assert summary(source) == {"1.jpg": (None, "a", "b"), "2.jpg": (None, "c"), "3.jpg": (None,)}
    assert source.multi_label
    assert source.class_names == ("a", "b", "c")
    check_labels(source)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_one_column_per_class(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, "1.jpg", "2.jpg")
    rows = [{"path": "1.jpg", "cat": 1, "dog": 1, "id": 7}, {"path": "2.jpg", "cat": 0, "dog": 1, "id": 8}]
    source = open_source(write_table(tmp_path / f"m{suffix}", rows), columns=Columns(labels=("dog", "cat")))
    assert summary(source) == {"1.jpg": (None, "cat", "dog"), "2.jpg": (None, "dog")}
    assert source.multi_label


def test_other_columns_and_another_folder(tmp_path: Path) -> None:
    write(tmp_path, "photos/1.jpg", "tables/")
    rows = [{"image": "1.jpg", "species": "cat", "fold": "Validation", "patient": 12}]
    source = open_source(
        write_table(tmp_path / "tables/m.csv", rows),
        columns=Columns(path="image", labels=("species",), split="fold", group="patient"),
        image_root=tmp_path / "photos",
    )
    (example,) = source.examples
    assert (example.labels, example.split, example.group) == (("cat",), "val", "12")
    assert source.read(example) == b"photos/1.jpg"


@pytest.mark.parametrize(
    ("label", "expected"),
    [(3, "3"), (3.0, "3"), (2.5, "2.5"), (True, "true"), ("", None), (None, None), (float("nan"), None)],
)
def test_what_a_label_becomes(tmp_path: Path, label: Any, expected: str | None) -> None:
    write(tmp_path, "1.jpg")
    for suffix in (".jsonl", ".parquet"):
        source = open_source(write_table(tmp_path / f"m{suffix}", [{"path": "1.jpg", "label": label}]))
        assert source.examples[0].labels == ((expected,) if expected else ())


def test_labels_that_are_not_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "1.jpg", "2.jpg")
    path = write_table(tmp_path / "m.csv", [{"path": f"{i}.jpg", "label": "a", "split": "test"} for i in (1, 2)])
    source = open_source(path, labelled=False)
    assert summary(source) == {"1.jpg": ("test",), "2.jpg": ("test",)}
    assert source.class_names == ()


def test_absolute_paths_and_names_in_any_encoding(tmp_path: Path) -> None:
    write(tmp_path, b"caf\xe9.jpg", "far/1.jpg")
    far = os.fsencode(tmp_path / "far/1.jpg")
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbfpath,label\r\ncaf\xe9.jpg,a\r\n" + far + b",b\r\n")
    source = open_source(tmp_path / "m.csv")
    assert {e.name: e.labels for e in source.examples} == {b"caf\xe9.jpg": ("a",), far: ("b",)}
    assert read_all(source) == {b"caf\xe9.jpg": b"caf\xe9.jpg", far: b"far/1.jpg"}


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("path,label\n1.jpg,a\nno.jpg,b\nnot.jpg,b\n", ["line 3: there is no file no.jpg", "line 4: there is no file"]),
        ("path,label\n1.jpg,a\n1.jpg,b\n", ["line 3: 1.jpg stood in line 2 already"]),
        ("path,label\nfolder,a\n", ["line 2: folder is a folder"]),
        ("path,label\n,a\n", ["line 2: no path"]),
        ("name,label\n1.jpg,a\n", ["no column path or file_name; there are label, name"]),
        ("path,split\n1.jpg,holdout\n", ["line 2: split 'holdout' is none of train, training, val"]),
        ("path,label\n1.jpg,\"['a', 'b']\"\n", ["is no list in JSON"]),
        ('path,label\n1.jpg,"[1, 2]"\n2.jpg,a\n', ["1 rows with a list of labels, 1 with one label"]),
        ("path,label\n1.jpg,a,b\n", ["line 2 has 3 fields, the header 2"]),
        ("path,path\n1.jpg,a\n", ["columns that occur twice: path"]),
        ('path,label\n"1.jpg,a\n', ["cannot be read: unexpected end of data"]),
        ("path,label\na\0b.jpg,a\n", ["cannot be a path"]),
        ("path,label\n", ["no column path or file_name"]),
        ("", ["no column path or file_name"]),
    ],
)
def test_manifests_that_contradict_the_files(tmp_path: Path, text: str, messages: list[str]) -> None:
    write(tmp_path, "1.jpg", "2.jpg", "folder/")
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(InputError, match=r"m\.csv") as caught:
        open_source(tmp_path / "m.csv")
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "1.jpg"\n', "line 1 is not JSON"),
        ('{"path": "1.jpg"}\n[1]\n', "line 2 is no JSON object"),
        ("[" * 100_000, "cannot be read"),
        ('{"path": "\\ud800.jpg"}\n', "cannot be a path"),
        ('{"path": "1.jpg", "label": {"a": 1}}\n', "where text or a number is meant"),
        ('{"path": "1.jpg", "a": 1, "b": 2}\n', "b is 2, which is neither 0 nor 1"),
        ('{"path": "1.jpg", "a": 1}\n', "no column b; there are a, path"),
    ],
)
def test_json_lines_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, "1.jpg")
    (tmp_path / "m.jsonl").write_text(text)
    columns = Columns(labels=("a", "b")) if '"a": 1' in text and "label" not in text else Columns()
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / "m.jsonl", columns=columns)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    rows = [{"path": f"{i}.jpg", "label": "a"} for i in range(25)]
    with pytest.raises(InputError, match=r"25 problems:(?s:.*)9.jpg\n  and 15 more$"):
        open_source(write_table(tmp_path / "m.csv", rows))


def test_damaged_parquet(tmp_path: Path) -> None:
    (tmp_path / "m.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match=r"m.parquet: cannot be read"):
        open_source(tmp_path / "m.parquet")


# metadata beside the images


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_metadata_labels_go_before_folders(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, "train/1.jpg", "train/sub/2.jpg", "test/3.jpg")
    write_table(
        tmp_path / f"train/metadata{suffix}",
        [{"file_name": "1.jpg", "label": "a"}, {"file_name": "./sub/2.jpg", "label": "b"}],
    )
    write_table(tmp_path / f"test/metadata{suffix}", [{"file_name": "3.jpg", "label": "b"}])
    assert summary(open_source(tmp_path)) == {
        "test/3.jpg": ("test", "b"),
        "train/1.jpg": ("train", "a"),
        "train/sub/2.jpg": ("train", "b"),
    }


def test_metadata_without_labels_adds_to_folders(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.jpg", "dog/2.jpg")
    rows = [{"file_name": "cat/1.jpg", "group": "x", "split": "test"}, {"file_name": "dog/2.jpg", "group": "y"}]
    write_table(tmp_path / "metadata.csv", rows)
    source = open_source(tmp_path)
    assert summary(source) == {"cat/1.jpg": ("test", "cat"), "dog/2.jpg": (None, "dog")}
    assert [e.group for e in source.examples] == ["x", "y"]


def test_metadata_and_files_that_disagree(tmp_path: Path) -> None:
    write(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    write_table(tmp_path / "metadata.csv", [{"file_name": name} for name in ("1.jpg", "1.jpg", "4.jpg")])
    with pytest.raises(InputError, match=r"1.jpg has a row already\n.*there is no image 4.jpg"):
        open_source(tmp_path)
    write_table(tmp_path / "metadata.csv", [{"file_name": "1.jpg"}])
    with pytest.raises(InputError, match=r"images without a row in metadata.csv: 2.jpg, 3.jpg"):
        open_source(tmp_path)
    assert len(open_source(tmp_path / "metadata.csv").examples) == 1  # as the message advises
    assert len(open_source(tmp_path, labelled=False).examples) == 3


# tar files


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


SAMPLES = {
    "0001.jpg": b"one",
    "0001.cls": b"3\n",
    "sub/0002.png": b"two",
    "sub/0002.json": b'{"label": "dog", "group": "g", "width": 9}',
    "sub/0002.txt": b"a caption",
    "0003.seg.png": b"a mask",
    "0003.jpeg": b"three",
    "0003.txt": b"cat",
    "0004.jpg": b"four",
}


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz", "s.tgz", "s.tar.bz2", "s.tar.xz"])
def test_webdataset(tmp_path: Path, name: str) -> None:
    compression = {"s.tar": "w", "s.tar.gz": "w:gz", "s.tgz": "w:gz", "s.tar.bz2": "w:bz2", "s.tar.xz": "w:xz"}[name]
    source = open_source(write_tar(tmp_path / name, SAMPLES, compression))
    assert summary(source) == {
        "0001.jpg": (None, "3"),
        "sub/0002.png": (None, "dog"),
        "0003.jpeg": (None, "cat"),
        "0004.jpg": (None,),
    }
    assert [e.group for e in source.examples] == [None, "g", None, None]
    assert read_all(source) == {e.name: SAMPLES[e.name.decode()] for e in source.examples}
    assert source.path(source.examples[0]) is None
    unlabelled = open_source(tmp_path / name, labelled=False)
    assert [(e.name, e.labels) for e in unlabelled.examples] == [(e.name, ()) for e in source.examples]
    backwards = list(source.iter_bytes(source.examples[::-1]))
    assert [content for _, content in backwards] == [b"four", b"three", b"two", b"one"]


def test_several_shards(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        for number in range(3):
            members = {f"{i}.{suffix}": f"{split}{number}{i}".encode() for i in range(3) for suffix in ("jpg", "cls")}
            write_tar(tmp_path / split / f"{number:04d}.tar", members)
    source = open_source(tmp_path)
    assert len(source.examples) == 18
    assert [e.name for e in source.examples[:4]] == [
        b"train/%s.jpg" % n for n in (b"0000.tar/0", b"0000.tar/1", b"0000.tar/2", b"0001.tar/0")
    ]
    for example in source.examples:
        split, shard, member = example.name.decode().split("/")
        assert example.split == {"train": "train", "validation": "val"}[split]
        assert source.read(example) == f"{split}{shard[3]}{member[0]}".encode() == example.labels[0].encode()


def test_a_tar_of_class_folders(tmp_path: Path) -> None:
    members = {
        f"./photos/{split}/{label}/{label}.{i}.jpg": b"x" for split in ("train", "test") for label in "ab" for i in "01"
    }
    source = open_source(write_tar(tmp_path / "photos.tar", members))
    assert {(e.split, *e.labels) for e in source.examples} == {(s, x) for s in ("train", "test") for x in "ab"}
    assert len(source.examples) == 8


def test_odd_members_of_a_tar(tmp_path: Path) -> None:
    names = {
        "../up.jpg": b"up",
        "/abs.jpg": b"abs",
        "C:\\x.jpg": b"windows",
        "\udcff.jpg": b"bytes",
        "a\nb.jpg": b"line",
    }
    path = write_tar(tmp_path / "odd.tar", names)
    with tarfile.open(path, "a") as tar:
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("dev.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("folder.jpg")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("._hidden.jpg"))
    source = open_source(path, labelled=False)
    contents = {os.fsdecode(name): content for name, content in read_all(source).items()}
    assert contents == names | dict.fromkeys(("link.jpg", "hard.jpg", "dev.jpg"), "not-a-file")
    assert source.ignored == {"hidden": 1}
    assert not list(tmp_path.parent.glob("up.jpg"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.jpg": b"", "1.png": b"", "1.cls": b"0"}, "1.png is the second image of one sample"),
        ({"1.jpg": b"", "1.json": b"{"}, "1: its .json is not JSON"),
        ({"1.jpg": b"", "1.json": b"[]"}, "no object"),
        ({"1.cls": b"0"}, "no images found"),
    ],
)
def test_tars_that_are_wrong(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(write_tar(tmp_path / "s.tar", members))


def test_members_of_one_name(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {"a/1.jpg": b"old", "b/1.jpg": b""})
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("a/1.jpg"))
    with pytest.raises(InputError, match=r"names that occur more than once: a/1.jpg"):
        open_source(path)


def test_truncated_tars_are_refused_at_every_length(tmp_path: Path) -> None:
    """tarfile itself stops in silence at a damaged header, and would lose the rest."""
    whole = write_tar(tmp_path / "s.tar", {f"{i}.jpg": bytes(700) for i in range(4)}).read_bytes()
    end = 4 * (512 + 1024)
    for length in [*range(0, end, 97), end - 1, end]:
        (tmp_path / "s.tar").write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a whole tar file"):
            open_source(tmp_path / "s.tar")
    (tmp_path / "s.tar").write_bytes(whole[: end + 512])
    assert len(open_source(tmp_path / "s.tar").examples) == 4
    for damaged in (512 + 1024 + 5, 2 * (512 + 1024) + 150):
        (tmp_path / "s.tar").write_bytes(whole[:damaged] + b"?" + whole[damaged + 1 :])
        with pytest.raises(InputError, match="not a whole tar file: damaged or cut short at byte"):
            open_source(tmp_path / "s.tar")


def test_a_tar_that_changes_after_it_was_listed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", {"1.jpg": b"one", "2.jpg": b"two"})
    source = open_source(path)
    assert source.read(source.examples[0]) == b"one"
    write_tar(path, {"1.jpg": b"new", "2.jpg": b"too"})
    os.utime(path, ns=(0, 0))
    assert read_all(source) == {b"1.jpg": "changed", b"2.jpg": "changed"}


# zip files


def test_zip(tmp_path: Path) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for split in ("train", "test"):
            for label in ("cat", "é"):
                archive.writestr(f"photos/{split}/{label}/1.jpg", f"{split} {label}")
        archive.writestr("__MACOSX/photos/train/cat/._1.jpg", b"")
        archive.writestr("photos/readme.md", b"")
        archive.mkdir("photos/train/empty")
    source = open_source(path)
    assert summary(source) == {
        f"photos/{split}/{label}/1.jpg": (split, label) for split in ("train", "test") for label in ("cat", "é")
    }
    assert source.ignored == {"hidden": 1, ".md": 1}
    assert read_all(source) == {e.name: f"{e.split} {e.labels[0]}".encode() for e in source.examples}


def test_zip_with_metadata(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("1.jpg", b"")
        archive.writestr("2.jpg", b"")
        archive.writestr("metadata.csv", "file_name,label\n1.jpg,a\n2.jpg,b\n")
    assert summary(open_source(tmp_path / "m.zip")) == {"1.jpg": (None, "a"), "2.jpg": (None, "b")}


def test_odd_members_of_a_zip(tmp_path: Path) -> None:
    path = tmp_path / "odd.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../up.jpg", b"up")
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, b"/etc/passwd")
        archive.writestr("damaged.jpg", b"damaged content")
        archive.writestr("lying.jpg", b"lying about its size")
    data = bytearray(path.read_bytes())
    at = data.find(b"damaged content")
    data[at] ^= 1  # the CRC no longer fits
    entry = data.rfind(b"lying.jpg") - 46
    data[entry + 24 : entry + 28] = struct.pack("<I", 1 << 31)
    path.write_bytes(data)
    source = open_source(path, labelled=False)
    assert read_all(source) == {
        b"../up.jpg": b"up",
        b"link.jpg": "not-a-file",
        b"damaged.jpg": "unreadable",
        b"lying.jpg": "too-big",
    }


def test_encrypted_and_damaged_zips(tmp_path: Path) -> None:
    path = tmp_path / "s.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/1.jpg", b"secret")
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.rfind(b"PK\x01\x02") + 8] |= 1  # says that it is encrypted
    path.write_bytes(data)
    assert read_all(open_source(path)) == {b"a/1.jpg": "unreadable"}
    path.write_bytes(data[:50])
    with pytest.raises(InputError, match="not a whole zip file"):
        open_source(path)


def test_zip_names_in_an_old_encoding(tmp_path: Path) -> None:
    """Bytes that say no encoding come through as they are."""
    path = tmp_path / "s.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("aXXX/1.jpg", b"")
        archive.writestr("b/1.jpg", b"")
    path.write_bytes(path.read_bytes().replace(b"aXXX", "a™".encode()))
    assert [e.name for e in open_source(path).examples] == ["a™/1.jpg".encode(), b"b/1.jpg"]


# tables of images


def hugging_face_schema(features: dict[str, Any], fields: list[tuple[str, Any]]) -> Any:
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return pa.schema(fields, metadata=metadata)


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMA = hugging_face_schema(
    {"image": {"_type": "Image"}, "label": {"names": ["dog", "cat"], "_type": "ClassLabel"}},
    [("image", IMAGE), ("label", pa.int64())],
)


def rows_of_images(count: int) -> list[dict[str, Any]]:
    return [{"image": {"bytes": b"image %d" % i, "path": f"{i}.jpg"}, "label": i % 2} for i in range(count)]


def test_parquet_of_images(tmp_path: Path) -> None:
    """As datasets on the Hugging Face hub are stored: splits in the names, classes as integers."""
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        table = pa.Table.from_pylist(rows_of_images(50), schema=SCHEMA)
        pq.write_table(table, tmp_path / f"data/{name}.parquet", row_group_size=7)
    source = open_source(tmp_path)
    assert len(source.examples) == 150
    assert source.class_names == ("cat", "dog")
    assert [e.split for e in source.examples] == ["train"] * 100 + ["val"] * 50
    assert source.examples[51].name == b"data/train-00001-of-00002.parquet/1"
    assert source.examples[51].labels == ("cat",)
    assert list(read_all(source).values()) == [b"image %d" % i for i in range(50)] * 3
    picked = [source.examples[i] for i in (149, 3, 4, 30, 29, 100, 0)]
    assert [content for _, content in source.iter_bytes(picked)] == [b"image %d" % i for i in (49, 3, 4, 30, 29, 0, 0)]


def test_parquet_of_plain_bytes(tmp_path: Path) -> None:
    rows = [
        {"jpg": b"one", "label": "a", "split": "test", "group": 1},
        {"jpg": None, "label": "b", "split": None, "group": 2},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    source = open_source(tmp_path / "m.parquet")
    assert summary(source) == {"0": ("test", "a"), "1": (None, "b")}
    assert read_all(source) == {b"0": b"one", b"1": "empty"}


def test_which_column_holds_the_images(tmp_path: Path) -> None:
    rows = [{"left": b"l", "right": b"r", "label": "a"}]
    path = tmp_path / "m.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(InputError, match="several columns may hold the images: left, right"):
        open_source(path)
    assert read_all(open_source(path, columns=Columns(path="right"))) == {b"0": b"r"}
    with pytest.raises(InputError, match=r"no column fold; there are label, left, right"):
        open_source(path, columns=Columns(path="right", split="fold"))


def save_dataset(folder: Path, rows: list[dict[str, Any]], split: str, shards: int = 2) -> None:
    """What `Dataset.save_to_disk` of the package datasets writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        table = pa.Table.from_pylist(rows[i::shards], schema=SCHEMA)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": split}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_saved_datasets(tmp_path: Path) -> None:
    rows = rows_of_images(30)
    rows[2]["image"]["bytes"] = None  # only a path: "2.jpg"
    write(tmp_path, "both/train/2.jpg")
    (tmp_path / "both/train/2.jpg").unlink()
    (tmp_path / "both/train").rmdir()
    for split in ("train", "test"):
        save_dataset(tmp_path / "both" / split, rows, split)
    (tmp_path / "both/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    write(tmp_path, "both/train/2.jpg")
    source = open_source(tmp_path / "both")
    assert [e.split for e in source.examples] == ["test"] * 30 + ["train"] * 30
    assert source.class_names == ("cat", "dog")
    expected = [b"image %d" % i for shard in (0, 1) for i in range(shard, 30, 2)]
    contents = list(read_all_or_reason(source))
    assert contents[:30] == [expected[0], "missing", *expected[2:]]
    assert contents[30:] == [expected[0], b"both/train/2.jpg", *expected[2:]]
    single = open_source(tmp_path / "both/train")
    assert {e.split for e in single.examples} == {"train"}
    assert single.examples[20].name == b"data-00001-of-00002.arrow/5"


def read_all_or_reason(source: Source) -> Iterator[bytes | str]:
    for _, content in source.iter_bytes(source.examples):
        assert not isinstance(content, Path)
        yield content.reason if isinstance(content, ImageError) else content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_dict.json": '{"splits": ["train", "unsupervised"]}'}, "splits unsupervised are none of train"),
        ({"state.json": '{"_indices_files": [{"filename": "i.arrow"}]}'}, "flatten_indices"),
        ({"state.json": "[]]"}, "not what save_to_disk writes"),
        ({"data-00000-of-00001.arrow": "no arrow"}, "cannot be read"),
    ],
)
def test_saved_datasets_that_are_wrong(tmp_path: Path, change: dict[str, str], message: str) -> None:
    save_dataset(tmp_path / "d", rows_of_images(3), "train", shards=1)
    for name, text in change.items():
        (tmp_path / "d" / name).write_text(text)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / "d")


def test_tars_and_parquet_together(tmp_path: Path) -> None:
    write(tmp_path, "a.tar", "b.parquet")
    with pytest.raises(InputError, match="both tar and Parquet files"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("imagenet-val-000012.tar", "val"),
        ("data/validation/7.tar", "val"),
        ("test/train-1.tar", "train"),
        ("trainer.tar", None),
        ("0001.tar", None),
    ],
)
def test_split_in_the_name_of_a_shard(name: str, split: str | None) -> None:
    assert split_in_name(name) == split


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "m.parquet")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'probe-jax\[parquet\]'"):
        open_source(tmp_path / "m.parquet")


@pytest.mark.soak
@given(st.binary(max_size=3000))
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
def test_damaged_containers_fail_cleanly(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    for name in ("d.tar", "d.zip", "d.parquet", "d.csv", "d.jsonl"):
        (folder / name).write_bytes(data)
        with contextlib.suppress(InputError):
            read_all(open_source(folder / name))
