"""`probe cache ls|verify|merge|prune|rm`: upkeep changes plans and removes files, and never an embedding."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from probe import cache_tools
from probe.cache import Cache, write_cache
from probe.cli import main
from probe.config import (
    CacheLsConfig,
    CacheMergeConfig,
    CachePruneConfig,
    CacheRmConfig,
    CacheVerifyConfig,
    EmbedConfig,
)
from probe.embed import embed
from probe.errors import ConfigError, CorruptError, InputError, MismatchError


@pytest.fixture
def settings(image_folder: Path, tiny_clip: Path, tmp_path: Path) -> EmbedConfig:
    """A cache of 48 images and a failed one, in shards of 16."""
    (image_folder / "train/red/bad.png").write_bytes(b"no image")
    settings = EmbedConfig(
        images=image_folder,
        backbone=str(tiny_clip),
        out=tmp_path / "cache",
        batch_size=8,
        precision="float32",
        shard_rows=16,
        num_workers=2,
    )
    embed(settings)
    return settings


def contents(root: Path) -> dict[bytes, tuple[bytes, str, str]]:
    cache = Cache.open(root)
    labels = [cache.class_names[label] for label in cache.table.labels]
    rows = zip(cache.table.names, cache.embeddings(), labels, cache.table.splits.tolist(), strict=True)
    return {name: (row.tobytes(), label, split) for name, row, label, split in rows}


class TestLs:
    def test_it_says_what_there_is(self, settings: EmbedConfig) -> None:
        summary = cache_tools.ls(CacheLsConfig(cache=settings.out))
        assert (summary["num_images"], summary["num_embedded"], summary["num_failed"]) == (49, 48, 1)
        assert summary["counts"]["train"] == {"blue": 12, "green": 12, "red": 12}
        text = cache_tools.describe_ls(summary)
        assert "pooler [16] float32, projected [8] float32" in text
        assert "train: blue 12, green 12, red 12" in text


class TestVerify:
    def test_a_sound_cache(self, settings: EmbedConfig) -> None:
        summary = cache_tools.verify(CacheVerifyConfig(cache=settings.out, deep=settings.images))
        assert (summary["num_shards"], summary["num_rows"], summary["num_plans"]) == (3, 48, 2)
        assert summary["deep"] == {"num_same": 48, "num_unknown": 1}
        assert "sound: 48 embeddings in 3 shards" in cache_tools.describe_verify(summary)

    @pytest.mark.parametrize("pattern", ["cache.json", "plan/*", "shards/*/*.h5", "shards/*/*.json", "failed/*"])
    def test_what_is_damaged_is_named_and_repaired(self, pattern: str, settings: EmbedConfig) -> None:
        before = contents(settings.out)
        path = sorted(settings.out.glob(pattern))[-1]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        with pytest.raises(CorruptError, match=f"{path.name}.*--repair"):
            cache_tools.verify(CacheVerifyConfig(cache=settings.out))
        summary = cache_tools.verify(CacheVerifyConfig(cache=settings.out, repair=True))
        assert summary["removed"]
        assert "run the same `probe embed` again" in cache_tools.describe_verify(summary)
        embed(settings)
        assert contents(settings.out) == before
        cache_tools.verify(CacheVerifyConfig(cache=settings.out))

    def test_a_shard_that_is_not_the_one_its_sidecar_means(self, settings: EmbedConfig) -> None:
        first, second, *_ = sorted(settings.out.glob("shards/*/*.h5"))
        shutil.copy(first, second)
        with pytest.raises(CorruptError, match=second.name):
            cache_tools.verify(CacheVerifyConfig(cache=settings.out))

    def test_an_orphan_is_a_note(self, settings: EmbedConfig) -> None:
        first = min(settings.out.glob("shards/*/*.h5"))
        shutil.copy(first, first.with_name("000009-0123456789ab-00000-0123456789ab.h5"))
        summary = cache_tools.verify(CacheVerifyConfig(cache=settings.out))
        assert summary["notes"] == [
            "0000/000009-0123456789ab-00000-0123456789ab.h5: no sidecar and no plan knows this shard"
        ]

    def test_deep_finds_images_that_changed_unnoticed(self, settings: EmbedConfig) -> None:
        path = settings.images / "train/red/003.png"
        status = path.stat()
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(MismatchError, match=r"1 images are not what.*train/red/003\.png.*--verify-content"):
            cache_tools.verify(CacheVerifyConfig(cache=settings.out, deep=settings.images))


class TestMerge:
    def test_two_halves_make_the_whole(self, settings: EmbedConfig, tmp_path: Path) -> None:
        halves = []
        for index in range(2):
            half = tmp_path / f"images-{index}"
            shutil.copytree(settings.images, half)
            for path in sorted(half.rglob("*.png"))[index::2]:
                path.unlink()
            halves.append(tmp_path / f"cache-{index}")
            embed(dataclasses.replace(settings, images=half, out=halves[-1]))
        summary = cache_tools.merge(CacheMergeConfig(caches=tuple(halves), out=tmp_path / "merged"))
        assert (summary["num_embedded"], summary["num_failed"]) == (48, 1)
        assert "48 of 49 images" in cache_tools.describe_merge(summary)
        assert contents(tmp_path / "merged") == contents(settings.out)
        assert [failure.name for failure in Cache.open(tmp_path / "merged").failures] == [b"train/red/bad.png"]
        cache_tools.verify(CacheVerifyConfig(cache=tmp_path / "merged"))
        # copied files have the times of the originals: the merged cache knows the whole folder
        again = embed(dataclasses.replace(settings, out=tmp_path / "merged"))
        assert again["num_computed"] == 0

    def test_classes_groups_and_known_embeddings_are_united(self, tmp_path: Path) -> None:
        x = np.arange(12, dtype=np.float32).reshape(4, 3)
        write_cache(
            tmp_path / "a", x[:2], names=[b"1", b"2"], labels=[("m",), ("z",)], class_names="mz", groups=["g", "h"]
        )
        write_cache(
            tmp_path / "b",
            x[1:],
            names=[b"2", b"3", b"4"],
            labels=[("z",), ("a",), ("m",)],
            class_names="amz",
            groups=["h", "", "g"],
        )
        cache_tools.merge(CacheMergeConfig(caches=(tmp_path / "a", tmp_path / "b"), out=tmp_path / "c"))
        cache = Cache.open(tmp_path / "c")
        assert cache.class_names == ("a", "m", "z")
        assert list(cache.table.names) == [b"1", b"2", b"3", b"4"]
        assert cache.table.labels.tolist() == [1, 2, 0, 1]
        assert cache.table.groups.tolist() == ["g", "h", "", "g"]
        np.testing.assert_array_equal(cache.embeddings(), x)

    def test_names_that_clash(self, tmp_path: Path) -> None:
        for index, name in enumerate("ab"):
            keys = np.arange(64, dtype=np.uint8).reshape(2, 32) + np.uint8(100 * index)
            write_cache(tmp_path / name, np.full((2, 3), index, np.float32), names=[b"same", name.encode()], keys=keys)
        merge = CacheMergeConfig(caches=(tmp_path / "a", tmp_path / "b"), out=tmp_path / "c")
        with pytest.raises(InputError, match=r"1 names stand for unlike.*'same'.*--prefix"):
            cache_tools.merge(merge)
        assert not (tmp_path / "c").exists()
        cache_tools.merge(CacheMergeConfig(caches=merge.caches, out=merge.out, prefix=True))
        cache = Cache.open(tmp_path / "c")
        assert list(cache.table.names) == [b"a/same", b"a/a", b"b/same", b"b/b"]
        assert cache.embeddings()[:, 0].tolist() == [0, 0, 1, 1]

    def test_what_cannot_be_merged(self, tmp_path: Path) -> None:
        write_cache(tmp_path / "a", np.zeros((2, 3), np.float32))
        write_cache(tmp_path / "b", np.zeros((2, 4), np.float32))
        with pytest.raises(MismatchError, match=r"views\.pooler is 4 there and 3 now"):
            cache_tools.merge(CacheMergeConfig(caches=(tmp_path / "a", tmp_path / "b"), out=tmp_path / "c"))
        with pytest.raises(InputError, match="exists already"):
            cache_tools.merge(CacheMergeConfig(caches=(tmp_path / "a", tmp_path / "a"), out=tmp_path / "b"))
        with pytest.raises(ConfigError, match="two folders or more"):
            CacheMergeConfig(caches=(tmp_path / "a",), out=tmp_path / "c")


class TestPrune:
    def test_it_removes_what_nothing_uses(self, settings: EmbedConfig) -> None:
        for path in sorted(settings.images.rglob("*.png"))[:20]:  # the first shard, and some of the second
            path.unlink()
        embed(settings)
        before = contents(settings.out)
        num_shards = len(list(settings.out.glob("shards/*/*.h5")))
        dry = cache_tools.prune(CachePruneConfig(cache=settings.out, dry_run=True))
        assert contents(settings.out) == before
        summary = cache_tools.prune(CachePruneConfig(cache=settings.out))
        assert summary["removed"] == dry["removed"]
        assert summary["num_bytes"] > 0
        assert len(list(settings.out.glob("shards/*/*.h5"))) == num_shards - 1
        assert len(list(settings.out.glob("plan/*"))) == 1
        assert contents(settings.out) == before
        cache_tools.verify(CacheVerifyConfig(cache=settings.out))
        assert cache_tools.prune(CachePruneConfig(cache=settings.out))["removed"] == []
        assert embed(settings)["num_computed"] == 0
        assert "0 files" in cache_tools.describe_prune(cache_tools.prune(CachePruneConfig(cache=settings.out)))

    def test_what_was_pruned_can_be_embedded_again(self, settings: EmbedConfig, tmp_path: Path) -> None:
        before = contents(settings.out)
        shutil.copytree(settings.images, tmp_path / "aside")
        for path in sorted(settings.images.rglob("*.png"))[14:34]:
            path.unlink()
        embed(settings)
        cache_tools.prune(CachePruneConfig(cache=settings.out))
        shutil.rmtree(settings.images)
        (tmp_path / "aside").rename(settings.images)
        assert embed(settings)["num_computed"] == 16  # those of the one shard that nothing used any more
        assert contents(settings.out) == before


class TestRm:
    def test_a_cache_goes_and_what_is_not_its_own_stays(
        self, settings: EmbedConfig, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cache = settings.out
        (cache / "notes.txt").write_text("mine")
        before = sorted(cache.rglob("*"))
        num_files = sum(path.is_file() for path in before)
        assert main(["cache", "rm", str(cache), "--dry-run"]) == 0
        assert f"would be removed; not the cache's own, and left: {cache / 'notes.txt'}" in capsys.readouterr().out
        assert sorted(cache.rglob("*")) == before
        assert main(["cache", "rm", str(cache), "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert len(summary["removed"]) == num_files - 1
        assert summary["removed"][-1] == str(cache / "cache.json")
        assert list(cache.iterdir()) == [cache / "notes.txt"]
        assert main(["cache", "rm", str(cache)]) == 3
        assert "is not a cache" in capsys.readouterr().err
        assert (cache / "notes.txt").read_text() == "mine"

    def test_nothing_is_left_of_its_folder(self, tmp_path: Path) -> None:
        write_cache(tmp_path / "cache", np.zeros((2, 3), np.float32))
        rm = cache_tools.rm(CacheRmConfig(cache=tmp_path / "cache"))
        assert rm["left"] == []
        assert not (tmp_path / "cache").exists()
