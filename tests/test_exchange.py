"""`probe cache export|import`: what is exported is imported again, and features from elsewhere come in."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from probe import bundle
from probe.cache import Cache, merge_caches, write_cache
from probe.config import CacheExportConfig, CacheImportConfig, FitLinearConfig
from probe.errors import ConfigError, InputError, MismatchError
from probe.exchange import describe_export, describe_import, export_cache, import_features
from probe.linear import fit_linear

RNG = np.random.default_rng(0)
EMBEDDINGS = {
    "pooler": RNG.standard_normal((5, 4)).astype(np.float32),
    "projected": RNG.standard_normal((5, 2)).astype(np.float32),
}
NAMES = [b"a/1.png", "ä/2.png".encode(), b"\xff/3.png", b"=4", b"new\nline"]


def equal_tables(a: Cache, b: Cache) -> None:
    assert list(a.table.names) == list(b.table.names)
    assert a.class_names == b.class_names
    assert a.multi_label == b.multi_label
    np.testing.assert_array_equal(a.table.labels, b.table.labels)
    np.testing.assert_array_equal(a.table.splits, b.table.splits)
    np.testing.assert_array_equal(a.table.groups, b.table.groups)
    for view in a.views:
        np.testing.assert_array_equal(a.embeddings(view), b.embeddings(view))


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("suffix", [".h5", ".npz", ".parquet"])
def test_there_and_back(suffix: str, multi_label: bool, tmp_path: Path) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    labels = (
        [("cat", "dog"), ("dog",), (), ("cat",), ("dog",)]
        if multi_label
        else [("cat",), ("dog",), ("cat",), ("dog",), ("cat",)]
    )
    write_cache(
        tmp_path / "a",
        EMBEDDINGS,
        names=NAMES,
        labels=labels,
        class_names=("cat", "dog"),
        multi_label=multi_label,
        splits=["train", "val", "test", None, "train"],
        groups=["g", None, None, "h", "g"],
    )
    file = tmp_path / f"all{suffix}"
    summary = export_cache(CacheExportConfig(cache=tmp_path / "a", single=file))
    assert summary["num_bytes"] == file.stat().st_size
    assert "5 rows, views pooler, projected" in describe_export(summary)
    with pytest.raises(InputError, match="--overwrite"):
        export_cache(CacheExportConfig(cache=tmp_path / "a", single=file))
    export_cache(CacheExportConfig(cache=tmp_path / "a", single=file, overwrite=True))
    summary = import_features(CacheImportConfig(features=file, out=tmp_path / "b"))
    assert "5 rows" in describe_import(summary)
    equal_tables(Cache.open(tmp_path / "a"), Cache.open(tmp_path / "b"))


def test_a_head_is_trained_on_imported_features_and_says_what_it_lacks(tmp_path: Path) -> None:
    labels = np.arange(60) % 3
    features = RNG.standard_normal((60, 8)) + 3 * np.eye(3, 8)[labels]
    np.savez(tmp_path / "clever.npz", embeddings=features, labels=np.array(["a", "b", "c"])[labels])
    import_features(CacheImportConfig(features=tmp_path / "clever.npz", out=tmp_path / "cache"))
    metrics = fit_linear(FitLinearConfig(cache=tmp_path / "cache", out=tmp_path / "run"))
    assert metrics["splits"]["train"]["accuracy"] > 0.9
    with pytest.raises(InputError, match=r"features imported from clever\.npz"):
        bundle.load(tmp_path / "run").load_backbone()


def test_only_features_of_one_extractor_are_merged(tmp_path: Path) -> None:
    for name, value in (("a", 0), ("b", 1)):
        np.savez(tmp_path / f"{name}.npz", embeddings=np.full((2, 3), value), names=np.array([name, name * 2]))
    for extractor, error in ((None, "extractor is"), ("ResNet of our own", None)):
        caches = tuple(tmp_path / f"{extractor}-{name}" for name in "ab")
        for name, cache in zip("ab", caches, strict=True):
            import_features(CacheImportConfig(features=tmp_path / f"{name}.npz", out=cache, extractor=extractor))
        if error:
            with pytest.raises(MismatchError, match=error):
                merge_caches(caches, tmp_path / "merged", prefix=False)
        else:
            assert len(merge_caches(caches, tmp_path / "merged", prefix=False).inputs) == 4


def test_plain_h5py_reads_an_export(tmp_path: Path) -> None:
    write_cache(tmp_path / "a", EMBEDDINGS, labels=np.array([0, 1, 0, -1, 1]), class_names=("cat", "dog"))
    export_cache(CacheExportConfig(cache=tmp_path / "a", single=tmp_path / "all.h5"))
    with h5py.File(tmp_path / "all.h5") as file:
        np.testing.assert_array_equal(file["embeddings/pooler"], EMBEDDINGS["pooler"])
        assert file["labels"][:].tolist() == [0, 1, 0, -1, 1]
        assert file["class_names"][:].tolist() == [b"cat", b"dog"]


def test_features_made_elsewhere(tmp_path: Path) -> None:
    x = EMBEDDINGS["pooler"]
    np.savez(tmp_path / "text.npz", embeddings=x.astype(np.float64), labels=np.array(["b", "a", "b", "a", "a"]))
    np.savez(tmp_path / "numbers.npz", embeddings=x, labels=np.array([2, 0, 1, 2, 2]))
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "x.csv").write_text(
        "file_name,label,split\n" + "".join(f"{i}.jpg,{'ab'[i % 2]},{'valid' if i else 'train'}\n" for i in range(5))
    )
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["embeddings"] = x
        file["labels"] = [1, 0, 1, 0, 0]
    for index, (name, table) in enumerate(
        [("text.npz", None), ("numbers.npz", None), ("x.npy", tmp_path / "x.csv"), ("x.h5", None)]
    ):
        import_features(CacheImportConfig(features=tmp_path / name, out=tmp_path / f"{index}", table=table))
    caches = [Cache.open(tmp_path / f"{index}") for index in range(4)]
    for cache in caches:
        np.testing.assert_array_equal(cache.embeddings(), x)
    assert [[cache.class_names[label] for label in cache.table.labels] for cache in caches] == [
        list("babaa"), list("20122"), list("ababa"), list("10100")
    ]  # fmt: skip
    assert caches[2].table.names[0] == b"0.jpg"
    assert caches[2].table.splits.tolist() == ["train", "val", "val", "val", "val"]


def test_features_that_cannot_be_used(tmp_path: Path) -> None:
    np.savez(tmp_path / "none.npz", labels=np.arange(3))
    np.savez(tmp_path / "objects.npz", embeddings=np.array([{}, {}], object))
    np.save(tmp_path / "x.npy", EMBEDDINGS["pooler"])
    (tmp_path / "short.csv").write_text("label\na\n")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "bad.h5").write_bytes(b"\x89HDF\r\n")
    np.savez(tmp_path / "split.npz", embeddings=np.zeros((1, 2)), splits=np.array(["dev"]))
    for name, table, error, message in [
        ("none.npz", None, InputError, r"no embeddings among its columns \['labels'\]"),
        ("objects.npz", None, InputError, "plain arrays"),
        ("x.npy", None, ConfigError, "--table"),
        ("x.npy", "short.csv", InputError, "has 1 lines, and .* has 5 rows"),
        ("bad.npz", None, InputError, "not an .npz file"),
        ("bad.h5", None, InputError, "not a readable HDF5 file"),
        ("split.npz", None, InputError, r"splits \['dev'\]"),
        ("absent.npz", None, InputError, "No such file"),
        ("x.txt", None, ConfigError, "must end with .npz"),
    ]:
        with pytest.raises(error, match=message):
            import_features(
                CacheImportConfig(
                    features=tmp_path / name, out=tmp_path / "c", table=tmp_path / table if table else None
                )
            )
        assert not (tmp_path / "c").exists()
