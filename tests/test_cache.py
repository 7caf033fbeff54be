"""The cache folder: what is written is read back, and nothing is trusted that does not prove itself."""

import ast
import hashlib
import os
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from probe.cache import (
    FAILED,
    KNOWN,
    Cache,
    CacheWriter,
    Facts,
    Failure,
    Plan,
    ShardContents,
    known_keys,
    make_inputs,
    make_manifest,
    write_cache,
)
from probe.cache.hdf5 import all_finite, build_image, safe_open
from probe.cache.index import KeyIndex
from probe.cache.plan import Names
from probe.cache.sealed import open_record, seal_record
from probe.errors import CorruptError, InputError, MismatchError

IDENTITY = {"views": {"pooler": 4}, "stored_dtype": "float32", "batch_size": 2}


def content_key(content: bytes) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(content).digest(), np.uint8)


def embedding(content: bytes) -> np.ndarray:
    return content_key(content)[:4].astype(np.float32)


def inputs_of(files: dict[bytes, tuple[bytes, str]], *, mtime: int = 1) -> tuple:
    """Inputs for {name: (content, class)}."""
    names = sorted(files)
    classes = sorted({label for _, label in files.values()})
    return make_inputs(
        names,
        labels=[(files[name][1],) for name in names],
        splits=["train"] * len(names),
        groups=[None] * len(names),
        sizes=[len(files[name][0]) for name in names],
        mtimes_ns=[mtime] * len(names),
        class_names=classes,
        multi_label=False,
    )


def embed_all(
    root: Path, files: dict[bytes, tuple[bytes, str]], *, shard_rows: int = 4, **options
) -> tuple[Plan, list]:
    """What `probe embed` does, with SHA-256 as the backbone; a content that starts with "bad" fails.

    Returns: the newest plan, and the contents that were "computed".
    """
    mtime = options.pop("mtime", 1)
    writer = CacheWriter(root, make_manifest(IDENTITY, {}, shard_rows))
    inputs = inputs_of(files, mtime=mtime)
    plan = writer.plan(inputs, **options)
    older, mine, computed = known_keys(plan), set(), []
    for number in range(writer.num_shards(plan)):
        rows, keys, vectors, failures, facts_rows = writer.shard_rows(plan, number), [], [], [], []
        names = [inputs.names[row] for row in rows]
        fact_keys = np.stack([content_key(files[name][0]) for name in names])
        for name, key in zip(names, fact_keys, strict=True):
            content = files[name][0]
            if content.startswith(b"bad"):
                facts_rows.append(FAILED)
                failures.append(Failure(name, "format", "not an image"))
            elif any(np.array_equal(key, other) for other in keys):
                facts_rows.append(next(i for i, other in enumerate(keys) if np.array_equal(key, other)))
            elif key.tobytes() in older or key.tobytes() in mine:
                facts_rows.append(KNOWN)
            else:
                facts_rows.append(len(keys))
                keys.append(key)
                vectors.append(embedding(content))
                computed.append(content)
        facts = Facts(
            names, [len(files[n][0]) for n in names], [mtime] * len(names), fact_keys, np.array(facts_rows, np.int32)
        )
        contents = ShardContents(
            facts,
            np.array(keys, np.uint8).reshape(-1, 32),
            {"pooler": np.array(vectors, np.float32).reshape(-1, 4)} if keys else {},
            tuple(failures),
        )
        writer.seal(plan, number, contents, {})
        mine |= {key.tobytes() for key in keys}
    return (plan if plan.complete else writer.complete(plan)), computed


def check_rows(root: Path, files: dict[bytes, tuple[bytes, str]]) -> None:
    """Every good file has its own embedding and label, in order; every bad one a record."""
    cache = Cache.open(root)
    good = [name for name in sorted(files) if not files[name][0].startswith(b"bad")]
    assert list(cache.table.names) == good
    expected = [embedding(files[name][0]) for name in good]
    np.testing.assert_array_equal(cache.embeddings(), np.array(expected).reshape(-1, 4))
    assert [cache.class_names[label] for label in cache.table.labels] == [files[name][1] for name in good]
    assert [failure.name for failure in cache.failures] == [name for name in sorted(files) if name not in good]
    np.testing.assert_array_equal(cache.table.keys, [content_key(files[name][0]) for name in good] or np.zeros((0, 32)))


# Contents are few, so that duplicates are common; a revision is any change of the folder at all.
folders = st.dictionaries(
    st.binary(min_size=1, max_size=3),
    st.tuples(st.sampled_from([b"one", b"two22", b"three", b"bad", b"bad2"]), st.sampled_from("ab")),
).filter(bool)


@settings(max_examples=30, deadline=None)
@given(revisions=st.lists(st.tuples(folders, st.booleans(), st.booleans()), min_size=1, max_size=4))
def test_any_history_of_a_folder_gives_every_image_its_own_embedding(revisions, tmp_path_factory) -> None:
    root = tmp_path_factory.mktemp("cache") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # it is most of the time, and nothing crashes here
        follow(root, revisions)


def follow(root: Path, revisions) -> None:
    seen: set[bytes] = set()
    for mtime, (files, rehash, retry) in enumerate(revisions):
        # times are new in every revision: sizes alone must not be trusted
        _, computed = embed_all(root, files, mtime=mtime, rehash=rehash, retry_failed=retry)
        assert not seen & set(computed), "computed twice"
        assert len(set(computed)) == len(computed), "a duplicate was computed"
        seen |= set(computed)
        check_rows(root, files)


def test_relabelling_and_moving_computes_nothing(tmp_path: Path) -> None:
    files = {b"a/%d" % i: (b"content %d" % i, "a") for i in range(10)}
    _, computed = embed_all(tmp_path / "c", files)
    assert len(computed) == 10
    moved = {name.replace(b"a/", b"b/"): (content, "b") for name, (content, _) in files.items()}
    relabelled = {name: (content, "z") for name, (content, _) in files.items()}
    fewer = {name: files[name] for name in sorted(files)[:3]}
    for now in (moved, relabelled, fewer, files, files | moved):
        _, computed = embed_all(tmp_path / "c", now)
        assert computed == []
        check_rows(tmp_path / "c", now)


def test_nothing_changed_writes_nothing(tmp_path: Path) -> None:
    files = {b"%d" % i: (b"content %d" % i, "ab"[i % 2]) for i in range(6)} | {b"x": (b"bad", "a")}
    first, _ = embed_all(tmp_path / "c", files)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")}
    again, _ = embed_all(tmp_path / "c", files)
    assert again.id == first.id
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "c").rglob("*")} == before


def test_failed_images_are_tried_again_only_when_asked_or_changed(tmp_path: Path) -> None:
    root, files = tmp_path / "c", {b"1": (b"one", "a"), b"2": (b"bad", "a")}
    embed_all(root, files)
    plan, _ = embed_all(root, files)
    assert plan.revision == 1  # the open one and the complete one of the first run
    plan, _ = embed_all(root, files, retry_failed=True)
    assert plan.revision == 3
    mended = files | {b"2": (b"mended", "a")}
    _, computed = embed_all(root, mended)
    assert computed == [b"mended"]
    check_rows(root, mended)


def test_a_lost_shard_is_made_again(tmp_path: Path) -> None:
    root, files = tmp_path / "c", {b"%d" % i: (b"content %d" % i, "ab"[i % 2]) for i in range(10)}
    embed_all(root, files)
    shard = sorted((root / "shards").rglob("*.h5"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(CorruptError, match=r"probe cache verify .* --repair"):
        Cache.open(root)
    _, computed = embed_all(root, files)
    assert len(computed) == 4
    check_rows(root, files)
    assert any(path.read_bytes() == content for path in (root / "shards").rglob("*.h5"))


def test_an_unfinished_cache_is_refused_unless_partial_rows_will_do(tmp_path: Path) -> None:
    root, files = tmp_path / "c", {b"%d" % i: (b"content %d" % i, "ab"[i % 2]) for i in range(10)}
    plan, _ = embed_all(root, files)
    for path in [root / "plan" / f"{plan.id}.h5", *sorted((root / "shards").rglob("*.json"))[-1:]]:
        path.unlink()
    with pytest.raises(InputError, match="2 of 3 shards"):
        Cache.open(root)
    cache = Cache.open(root, partial=True)
    assert len(cache.table) == 8
    assert cache.num_pending == 2
    np.testing.assert_array_equal(cache.embeddings(), [embedding(files[name][0]) for name in cache.table.names])


def test_rows_in_any_order_and_in_chunks(tmp_path: Path) -> None:
    embeddings = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    write_cache(tmp_path / "c", {"pooler": embeddings, "projected": embeddings[:, :2]}, shard_rows=7)
    cache = Cache.open(tmp_path / "c")
    rows = np.random.default_rng(1).integers(0, 50, 80)
    np.testing.assert_array_equal(cache.embeddings("projected", rows), embeddings[rows, :2])
    chunks = list(cache.chunks(rows=rows, chunk_rows=9))
    assert {len(chunk) for chunk in chunks[:-1]} == {9}
    np.testing.assert_array_equal(np.concatenate(chunks), embeddings[rows])
    assert cache.embeddings(rows=np.zeros(0, int)).shape == (0, 6)
    assert (cache.views, cache.width("projected")) == (("pooler", "projected"), 2)
    with pytest.raises(InputError, match="no view 'other'; there are pooler, projected"):
        cache.embeddings("other")


def test_float16_is_stored_as_such_and_read_as_float32(tmp_path: Path) -> None:
    embeddings = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float16)
    write_cache(tmp_path / "c", embeddings)
    with h5py.File(next((tmp_path / "c/shards").rglob("*.h5"))) as file:  # plain h5py reads a shard
        assert file["embeddings/pooler"].dtype == np.float16
        assert file["embeddings/pooler"].fletcher32
        assert set(file) == {"key", "embeddings"}
    read = Cache.open(tmp_path / "c").embeddings()
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, embeddings)


def test_labels_of_several_classes_splits_and_groups(tmp_path: Path) -> None:
    write_cache(
        tmp_path / "c",
        np.eye(4, dtype=np.float32),
        labels=[("a", "c"), (), ("b",), ("c",)],
        class_names=("a", "b", "c"),
        multi_label=True,
        splits=["train", None, "val", "test"],
        groups=["g", "", None, "h"],
    )
    table = Cache.open(tmp_path / "c").table
    np.testing.assert_array_equal(table.labels, [[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert table.labels.dtype == bool
    assert table.splits.tolist() == ["train", "", "val", "test"]
    assert table.groups.tolist() == ["g", "", "", "h"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": [b"x", b"x", b"y"]}, "1 names are not distinct"),
        ({"names": [b"x"]}, "3 embeddings, but {'names': 1}"),
        ({"labels": np.array([0, 1, 2]), "class_names": ("a", "b")}, "labels from 0 to 2, and there are 2 class names"),
        ({"labels": [("a",), ("z",), ()], "class_names": ("a",)}, r"labels \['z'\] are not among"),
        ({"embeddings": np.array([[1.0], [np.nan], [2.0]])}, "not finite in 1 rows, the first is row 1"),
        ({"embeddings": np.zeros(3)}, r"shape \(3,\)"),
    ],
)
def test_arrays_that_do_not_fit_together(arguments, message, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_cache(tmp_path / "c", **{"embeddings": np.zeros((3, 2), np.float32), **arguments})
    assert not (tmp_path / "c").exists()


def test_a_mismatch_names_every_field_with_both_values(tmp_path: Path) -> None:
    write_cache(
        tmp_path / "c",
        np.zeros((2, 2), np.float32),
        identity={"batch_size": 32, "preprocessing": {"size": 224, "mean": [0, 1]}},
    )
    with pytest.raises(MismatchError) as error:
        CacheWriter(
            tmp_path / "c",
            make_manifest(
                {
                    "views": {"pooler": 2},
                    "stored_dtype": "float32",
                    "batch_size": 16,
                    "preprocessing": {"size": 336, "mean": (0, 1)},
                },
                {"backbone": "another name does not count"},
                64,
            ),
        )
    text = str(error.value)
    assert "batch_size is 32 there and 16 now" in text
    assert "preprocessing.size is 224 there and 336 now" in text
    assert "mean" not in text
    assert "choose another --out" in text


def test_a_shard_of_another_fingerprint_is_never_taken_up(tmp_path: Path) -> None:
    files = {b"%d" % i: (b"content %d" % i, "ab"[i % 2]) for i in range(6)}
    plan, _ = embed_all(tmp_path / "c", files)
    (tmp_path / "c/plan" / f"{plan.id}.h5").unlink()
    other = make_manifest(IDENTITY | {"batch_size": 3}, {}, 4)
    (tmp_path / "c/cache.json").write_bytes(other.encode())
    writer = CacheWriter(tmp_path / "c", other)
    for take_up in (
        lambda: Cache.open(tmp_path / "c", partial=True),
        lambda: writer.complete(writer.plan(inputs_of(files))),
        lambda: writer.plan(inputs_of(files, mtime=2)),
    ):
        with pytest.raises(MismatchError, match=r"made in another way than this cache.*--repair"):
            take_up()


def test_names_do_not_count_in_the_fingerprint_and_everything_else_does() -> None:
    manifest = make_manifest(IDENTITY, {"backbone": "a"}, 4)
    assert manifest.fingerprint == make_manifest(IDENTITY, {"backbone": "b"}, 8).fingerprint
    others = [make_manifest(IDENTITY | {field: 3}, {}, 4).fingerprint for field in (*IDENTITY, "new")]
    assert len({manifest.fingerprint, *others}) == 1 + len(others)


def test_what_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="is not a cache"):
            Cache.open(path)
    CacheWriter(tmp_path / "empty", make_manifest(IDENTITY, {}, 4))
    with pytest.raises(InputError, match="nothing is embedded yet"):
        Cache.open(tmp_path / "empty")


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "c", np.zeros((2, 2), np.float32))
    path = tmp_path / "c/cache.json"
    record = open_record(path.read_bytes(), path)
    path.write_bytes(seal_record(record | {"format_version": 2}, indent=1))
    with pytest.raises(MismatchError, match="format version 2"):
        Cache.open(tmp_path / "c")


def test_a_damaged_shard_is_noticed_on_first_touch(tmp_path: Path) -> None:
    write_cache(
        tmp_path / "c", np.zeros((8, 2), np.float32), shard_rows=4, keys=np.arange(256, dtype=np.uint8).reshape(8, 32)
    )
    shard = sorted((tmp_path / "c/shards").rglob("*.h5"))[1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    cache = Cache.open(tmp_path / "c")
    cache.embeddings(rows=np.arange(4))
    with pytest.raises(CorruptError, match=f"{shard.name}: damaged.*SHA-256.*--repair"):
        cache.embeddings()
    shard.write_bytes(data[:-1])
    with pytest.raises(CorruptError, match="bytes where"):
        Cache.open(tmp_path / "c")


def test_equal_inputs_give_equal_bytes_whenever_they_are_written(tmp_path: Path) -> None:
    embeddings = np.random.default_rng(0).standard_normal((30, 5)).astype(np.float32)
    for name in ("a", "b"):
        write_cache(tmp_path / name, embeddings, shard_rows=8)
        time.sleep(1.1 if name == "a" else 0)  # HDF5 would store seconds
    contents = [
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("a", "b")
    ]
    assert contents[0] == contents[1]


@given(
    stored=st.lists(st.binary(min_size=32, max_size=32), max_size=20, unique=True),
    other=st.lists(st.binary(min_size=32, max_size=32), max_size=5),
    prefix=st.booleans(),
)
def test_key_index_finds_exactly_what_is_there(stored, other, prefix) -> None:
    if prefix:  # all keys share what the index sorts by
        stored = list(dict.fromkeys(bytes(8) + key[8:] for key in stored))
        other = [bytes(8) + key[8:] for key in other]
    keys = np.frombuffer(b"".join(stored), np.uint8).reshape(-1, 32)
    index = KeyIndex(keys)
    np.testing.assert_array_equal(index.find(keys), np.arange(len(keys)))
    for key in other:
        assert (key in index) == (key in stored)


@given(names=st.lists(st.binary(max_size=8), max_size=20), seed=st.integers(0, 9))
def test_names_are_opaque_bytes(names, seed) -> None:
    packed = Names.of(names)
    assert list(packed) == names
    assert packed[: len(names)] == names
    rows = np.random.default_rng(seed).permutation(len(names))[:7]
    assert list(packed.take(rows)) == [names[row] for row in rows]
    with pytest.raises(IndexError):
        packed[len(names)]


@given(
    record=st.dictionaries(
        st.text(max_size=5), st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x, max_size=3))
    ),
    data=st.data(),
)
def test_a_sealed_record_notices_any_change(record, data) -> None:
    record = {key: value for key, value in record.items() if key != "check"} | {"one": 1}
    sealed = seal_record(record, indent=data.draw(st.sampled_from([None, 1])))
    assert open_record(sealed, Path("x")) == record
    position, bit = data.draw(st.integers(0, len(sealed) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(sealed)
    changed[position] ^= 1 << bit
    with pytest.raises(CorruptError):
        open_record(bytes(changed), Path("x"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_all_finite(dtype) -> None:
    array = np.array([[np.finfo(dtype).max, np.finfo(dtype).min], [0, np.finfo(dtype).smallest_subnormal]], dtype)
    assert all_finite(array)
    assert all_finite(array[:0])
    for bad in (np.inf, -np.inf, np.nan):
        assert not all_finite(np.where(array == 0, dtype(bad), array))


def test_safe_open_reads_what_is_plainly_there() -> None:
    image = build_image({"a/b": np.arange(6).reshape(2, 3), "empty": np.zeros((0, 4), np.float32)})
    with safe_open(image, "it") as file:
        np.testing.assert_array_equal(file.read("a/b"), np.arange(6).reshape(2, 3))
        assert file.read("empty").shape == (0, 4)
        assert file.children("a") == ["b"]
        with pytest.raises(CorruptError, match="it: `a/c` is missing"):
            file.read("a/c")
        with pytest.raises(CorruptError, match="int64 where float32 is meant"):
            file.read("a/b", dtypes="float32")
        with pytest.raises(CorruptError, match="is a group"):
            file.read("a")


def test_only_the_storage_module_writes() -> None:
    """Whoever has to do with caches writes files by storage's functions alone."""
    writing = {"write_bytes", "write_text", "tofile", "touch", "symlink_to", "hardlink_to"}
    found = []
    package = Path(__file__).parents[1] / "probe"
    verbs = [package / f"{name}.py" for name in ("embed", "embedding", "estimate", "cache_tools", "exchange")]
    for path in [*(package / "cache").glob("*.py"), *verbs]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                mode = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
                if name in writing or (name == "open" and mode and set(str(mode[0])) & set("wax+")):
                    found.append(f"{path.name}:{node.lineno}")
    assert found == []
