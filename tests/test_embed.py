"""`probe embed`: every image gets its own embedding, to the bit, however often and wherever it is run."""

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from probe import bundle
from probe.backbones import Backbone, ViTConfig, build_tower, load_backbone, make_embed_fn
from probe.cache import FAILED, KNOWN, Cache, load_manifest
from probe.config import EmbedConfig, FitLinearConfig, PredictConfig
from probe.embed import _default_shard_rows, describe, embed
from probe.embedding import Device, Item, embed_shard, make_run_batch, memory_explained
from probe.errors import ConfigError, FailedImagesError, InputError, MismatchError, OutOfMemoryError, StorageError
from probe.images import ImageError, LoadedImage, load_image
from probe.linear import fit_linear
from probe.predict import predict
from probe.sources import Example
from probe.stages import describe_stages


@pytest.fixture
def config(image_folder: Path, tiny_clip: Path, tmp_path: Path):
    """Configs over 48 images in shards of 16; any field can be replaced."""

    def make(**fields) -> EmbedConfig:
        defaults = {
            "images": image_folder,
            "backbone": str(tiny_clip),
            "out": tmp_path / "cache",
            "batch_size": 8,
            "precision": "float32",
            "shard_rows": 16,
            "num_workers": 2,
        }
        return EmbedConfig(**(defaults | fields))

    return make


def by_name(root: Path, view: str = "pooler") -> dict[bytes, bytes]:
    """Name -> the bytes of its embedding."""
    cache = Cache.open(root)
    return {name: row.tobytes() for name, row in zip(cache.table.names, cache.embeddings(view), strict=True)}


def shard_bytes(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / "shards").rglob("*.h5"))}


@pytest.mark.parametrize("checkpoint", ["tiny_clip", "tiny_resnet"])
def test_embeddings_are_those_of_the_backbone_applied_directly(checkpoint: str, config, request) -> None:
    folder = request.getfixturevalue(checkpoint)
    settings = config(backbone=str(folder))
    embed(settings)
    backbone = load_backbone(folder)
    cache = Cache.open(settings.out)
    assert cache.views == backbone.views
    embed_fn = make_embed_fn(backbone, backbone.views)
    for start in range(0, len(cache.table), 8):  # the batches that one would form by hand
        images = [
            load_image((settings.images / os.fsdecode(name)).read_bytes(), backbone.preprocessing)
            for name in cache.table.names[start : start + 8]
        ]
        direct = embed_fn(np.stack(images))
        for view in backbone.views:
            np.testing.assert_array_equal(cache.embeddings(view, np.arange(start, start + 8)), direct[view])


def test_what_the_cache_says_about_its_images(config, tiny_clip: Path) -> None:
    summary = embed(config())
    cache = Cache.open(config().out)
    assert summary["num_embedded"] == summary["num_computed"] == summary["num_images"] == 48
    assert summary["complete"]
    assert cache.class_names == ("blue", "green", "red")
    names = [os.fsdecode(name).split("/") for name in cache.table.names]
    assert [cache.class_names[label] for label in cache.table.labels] == [parts[1] for parts in names]
    assert cache.table.splits.tolist() == [parts[0] for parts in names]
    assert cache.provenance["backbone"] == str(tiny_clip)
    assert cache.provenance["batch_size"] == 8
    assert cache.provenance["preprocessor_config"]["crop_size"] == {"height": 16, "width": 16}
    text = describe(summary)
    assert "classes (3): blue, green, red" in text
    assert "48 of 48 images have embeddings" in text
    assert text.endswith("0 failed")


def test_counts_and_what_is_missing_are_told(config, image_folder: Path) -> None:
    shutil.rmtree(image_folder / "test" / "red")
    (image_folder / "train" / "violet").mkdir()
    (image_folder / "train" / "notes.txt").write_text("not an image")
    summary = embed(config())
    assert summary["counts"] == {
        "train": {"blue": 12, "green": 12, "red": 12},
        "test": {"blue": 4, "green": 4, "red": 0},
    }
    text = describe(summary)
    assert "train: 36 labels (blue 12, green 12, red 12)\n" in text
    assert "test: 8 labels (blue 4, green 4)\n" in text
    assert "note: test has no images of red\n" in text
    assert "left out: 1 .txt, 1 folder(s) without images (train/violet)\n" in text


def test_a_shard_is_some_seconds_of_work_and_whole_batches(config, tiny_clip: Path) -> None:
    """What Ctrl-C costs: the larger the tower, the fewer images."""
    embed(config(shard_rows=None))
    assert load_manifest(config().out).shard_rows == 1024
    backbone = load_backbone(tiny_clip)
    rows = {}
    for layers in (12, 24):
        large = ViTConfig(num_hidden_layers=layers, projection_dim=None)
        tower = build_tower(large)
        shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
        preprocessing = dataclasses.replace(backbone.preprocessing, resize=224, crop=(224, 224))
        variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        rows[layers] = _default_shard_rows(Backbone("", None, large, variables, preprocessing), Device("cpu", "cpu"))
    assert 200 < rows[12] < 260
    assert rows[24] == pytest.approx(rows[12] / 2, rel=0.05)
    assert _default_shard_rows(backbone, Device("gpu", "H100")) == 16384


def test_an_image_does_not_depend_on_its_place_or_company(config, image_folder: Path, tmp_path: Path) -> None:
    embed(config())
    whole = by_name(config().out)
    other = tmp_path / "other"
    for index, name in enumerate(sorted(whole)[::3]):
        target = other / f"{index % 2}" / f"{-index % 7}-{index}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image_folder / os.fsdecode(name), target)
    embed(config(images=other, out=tmp_path / "second"))
    assert set(by_name(tmp_path / "second").values()) == {whole[name] for name in sorted(whole)[::3]}


@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_embedding_depends_on_its_image_alone_to_the_bit(tiny_clip: Path, data: st.DataObject) -> None:
    """Wherever it stands in a batch, and whatever stands beside it: at one shape of the batch."""
    backbone = load_backbone(tiny_clip)
    run_batch = make_run_batch(backbone)
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    images = rng.integers(0, 256, (8, 16, 16, 3), np.uint8)
    order = data.draw(st.permutations(range(8)))
    filled = data.draw(st.integers(1, 8))
    other = np.zeros_like(images)
    other[:filled] = images[order[:filled]]
    for view, expected in run_batch(images).items():
        np.testing.assert_array_equal(np.asarray(expected)[order[:filled]], np.asarray(run_batch(other)[view])[:filled])


def test_the_stage_table(config, capsys: pytest.CaptureFixture[str]) -> None:
    table = embed(config())["stages"]
    assert sum(table["waited"].values()) == pytest.approx(table["seconds"], abs=0.01)
    assert table["num_batches"] == 6
    assert table["worked"]["decode"] > 0
    assert "utilisation" not in table  # too short a run for it to mean anything
    err = capsys.readouterr().err
    assert "stage      waited s" in err
    assert "bounds this run" in err
    assert "stages" not in embed(config())  # nothing was left to do
    assert capsys.readouterr().err == ""


def test_longer_runs_tell_the_use_of_the_device(config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probe.embed._LONG_ENOUGH", 0.0)
    summary = embed(config())
    assert 0 < summary["stages"]["utilisation"] < 1
    assert "float32 matrix products reach here" in describe_stages(summary["stages"])


def test_a_copy_in_the_next_shard_waits_for_the_first(config, image_folder: Path) -> None:
    """It is known only once the shard before is finished, which happens while the next one is being fed."""
    names = sorted(path for path in image_folder.rglob("*.png"))
    shutil.copy(names[15], names[15].with_name(names[15].stem + "-copy.png"))  # the first of the second shard
    summary = embed(config())
    assert (summary["num_images"], summary["num_computed"]) == (49, 48)
    cache = by_name(config().out)
    assert len(set(cache.values())) == 48


def test_a_bad_image_is_reported_and_shifts_nothing(config, image_folder: Path) -> None:
    embed(config())
    before = by_name(config().out)
    (image_folder / "train/blue/005a.png").write_bytes(b"not an image")
    (image_folder / "train/green/\udcff\n.png").write_bytes(b"")
    summary = embed(config())
    assert by_name(config().out) == before
    assert summary["num_failed"] == 2
    assert [failure["path"] for failure in summary["failures"]] == ["train/blue/005a.png", "train/green/\udcff\n.png"]
    text = describe(summary)
    assert "failed: train/blue/005a.png: format: " in text
    assert "failed: train/green/\\xff\\x0a.png: " in text
    assert text.splitlines()[-1].endswith("2 failed")
    assert len(list((config().out / "failed").iterdir())) == 1


def test_running_again_computes_nothing_and_writes_nothing(config) -> None:
    embed(config())
    before = {path: path.stat().st_mtime_ns for path in config().out.rglob("*")}
    summary = embed(config(batch_size=None, shard_rows=None))  # whoever continues reads what the creator chose
    assert summary["num_computed"] == 0
    assert summary["batch_size"] == 8
    assert {path: path.stat().st_mtime_ns for path in config().out.rglob("*")} == before


def test_the_monday_loop(config, image_folder: Path) -> None:
    """A mended label, a moved file, another split, a removed file and a duplicate: nothing is computed."""
    embed(config())
    before = by_name(config().out)
    (image_folder / "train/red/003.png").rename(image_folder / "train/blue/mended.png")
    (image_folder / "train/green/004.png").rename(image_folder / "test/green/moved.png")
    (image_folder / "test/red/001.png").unlink()
    shutil.copy(image_folder / "test/blue/000.png", image_folder / "test/blue/000-copy.png")
    summary = embed(config())
    assert (summary["num_computed"], summary["num_embedded"]) == (0, 48)
    after = by_name(config().out)
    assert after[b"train/blue/mended.png"] == before[b"train/red/003.png"]
    assert after[b"test/green/moved.png"] == before[b"train/green/004.png"]
    assert after[b"test/blue/000-copy.png"] == before[b"test/blue/000.png"]
    assert b"test/red/001.png" not in after
    table = Cache.open(config().out).table
    row = list(table.names).index(b"train/blue/mended.png")
    assert (table.labels[row], table.splits[row]) == (0, "train")


def test_only_changed_bytes_are_computed(config, image_folder: Path) -> None:
    embed(config())
    before = by_name(config().out)
    Image.new("RGB", (20, 24), "red").save(image_folder / "train/red/003.png")
    os.utime(image_folder / "train/red/004.png")  # touched, not changed
    assert embed(config())["num_computed"] == 1
    after = by_name(config().out)
    assert {name for name in after if after[name] != before[name]} == {b"train/red/003.png"}


def test_verify_content_does_not_trust_size_and_time(config, image_folder: Path) -> None:
    path = image_folder / "train/red/003.bmp"
    Image.new("RGB", (20, 24), "red").save(path)
    status = path.stat()
    embed(config())
    before = by_name(config().out)
    Image.new("RGB", (20, 24), "blue").save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert embed(config())["num_computed"] == 0
    assert by_name(config().out) == before
    assert embed(config(verify_content=True))["num_computed"] == 1
    after = by_name(config().out)
    assert {name for name in after if after[name] != before[name]} == {b"train/red/003.bmp"}
    assert embed(config(verify_content=True))["num_computed"] == 0


def test_failed_images_are_tried_again_when_asked_to(config, image_folder: Path) -> None:
    bad = image_folder / "train/red/zz.png"
    bad.write_bytes(b"no image")
    status = bad.stat()
    embed(config())
    bad.write_bytes((image_folder / "train/red/000.png").read_bytes()[:8])  # as long, still bad
    os.utime(bad, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert embed(config())["failures"][0]["reason"] == "format"
    assert embed(config(retry_failed=True))["failures"][0]["reason"] != ""
    shutil.copy(image_folder / "train/red/000.png", bad)
    summary = embed(config())
    assert (summary["num_failed"], summary["num_computed"], summary["num_embedded"]) == (0, 0, 49)


def test_on_error_fail_and_max_failures_end_the_run(config, image_folder: Path) -> None:
    for name in ("train/red/000a.png", "train/red/001a.png"):
        (image_folder / name).write_bytes(b"no image")
    with pytest.raises(InputError, match=r"train/red/000a\.png: format: .*--on-error skip"):
        embed(config(on_error="fail"))
    with pytest.raises(FailedImagesError, match=r"2 images have failed, and --max-failures is 1.*001a\.png"):
        embed(config(max_failures=1))
    assert embed(config(max_failures=2))["num_failed"] == 2
    with pytest.raises(FailedImagesError):  # known failures count, too
        embed(config(max_failures=1))
    with pytest.raises(InputError, match="000a"):
        embed(config(on_error="fail"))


def test_a_run_that_ended_early_continues_to_the_same_bytes(config, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "train/red/005a.png").write_bytes(b"no image")
    embed(config(out=tmp_path / "straight"))
    with pytest.raises(FailedImagesError):
        embed(config(max_failures=0))
    assert 0 < len(shard_bytes(config().out)) < 4
    with pytest.raises(InputError, match="of 4 shards"):
        Cache.open(config().out)
    embed(config())
    assert shard_bytes(config().out) == shard_bytes(tmp_path / "straight")
    assert by_name(config().out) == by_name(tmp_path / "straight")


def test_several_processes_divide_the_work(config, image_folder: Path, tmp_path: Path) -> None:
    shutil.copy(image_folder / "test/blue/000.png", image_folder / "train/red/000-copy.png")  # in two shares
    embed(config(out=tmp_path / "one"))
    for index in (2, 0):
        summary = embed(config(shard_index=index, num_shards=3))
        assert not summary["complete"]
        assert "left to other processes" in describe(summary)
    summary = embed(config(shard_index=1, num_shards=3))
    assert summary["complete"]
    assert by_name(config().out) == by_name(tmp_path / "one")


def test_another_way_of_making_embeddings_is_refused(config, tiny_resnet: Path) -> None:
    embed(config())
    for fields, expected in [
        ({"batch_size": 16}, "batch_size is 8 there and 16 now"),
        ({"dtype": "float16"}, 'stored_dtype is "float32" there and "float16" now'),
        ({"backbone": str(tiny_resnet)}, "backbone_fingerprint is "),
    ]:
        with pytest.raises(MismatchError, match=expected):
            embed(config(**fields))


def test_fast_decoding_never_mixes_with_exact(config, image_folder: Path, tmp_path: Path) -> None:
    for split, name in (("train", "red"), ("train", "green"), ("test", "red"), ("test", "green")):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (90, 120, 3), np.uint8)
        Image.fromarray(pixels).save(image_folder / split / name / "large.jpg")
    embed(config(out=tmp_path / "exact"))
    embed(config(decode="fast"))
    for out, decode in ((tmp_path / "exact", "fast"), (config().out, "exact")):
        with pytest.raises(MismatchError, match=r"preprocessing\.decode is "):
            embed(config(out=out, decode=decode))
    assert embed(config())["num_computed"] == 0  # whoever continues reads what the creator chose
    exact, fast = by_name(tmp_path / "exact"), by_name(config().out)
    assert {name for name in fast if fast[name] != exact[name]} == {name for name in fast if name.endswith(b".jpg")}


def test_a_run_on_a_fast_cache_predicts_with_fast_decoding(config, image_folder: Path, tmp_path: Path) -> None:
    Image.effect_noise((120, 90), 90).convert("RGB").save(image_folder / "test" / "red" / "large.jpg")
    embed(config(decode="fast"))
    for run, options in (("plain", {}), ("bundled", {"bundle_backbone": True})):
        fit_linear(FitLinearConfig(cache=config().out, out=tmp_path / run, **options))
        classifier = bundle.load(tmp_path / run)
        assert classifier.load_backbone().preprocessing.decode == "fast"
        answers = predict(PredictConfig(run=tmp_path / run, images=(image_folder / "test" / "red" / "large.jpg",)))
        cache = Cache.open(config().out)
        row = list(cache.table.names).index(b"test/red/large.jpg")
        logits = np.asarray(classifier.head.apply(cache.embeddings("pooler", np.array([row]))))
        expected = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(answers["predictions"][0]["probabilities"], expected[0], atol=1e-5)


def test_another_folder_with_the_same_weights_is_the_same_backbone(config, tiny_clip: Path, tmp_path: Path) -> None:
    embed(config())
    shutil.copytree(tiny_clip, tmp_path / "moved")
    assert embed(config(backbone=str(tmp_path / "moved")))["num_computed"] == 0


def test_unlabelled_images_are_embedded(config, image_folder: Path) -> None:
    summary = embed(config(images=image_folder / "train/red"))
    assert summary["num_embedded"] == 12
    assert Cache.open(config().out).table.labels.tolist() == [-1] * 12


def test_a_manifest_with_columns_of_its_own(config, image_folder: Path, tmp_path: Path) -> None:
    rows = [
        f"{path.relative_to(image_folder)},{path.parent.name},{path.stem}" for path in image_folder.rglob("00?.png")
    ]
    (tmp_path / "list.csv").write_text("\n".join(["photo,colour,patient", *rows]))
    columns = {"path_column": "photo", "label_column": ("colour",), "group_column": "patient"}
    summary = embed(config(images=tmp_path / "list.csv", image_root=image_folder, **columns))
    assert summary["num_embedded"] == len(rows)
    table = Cache.open(config().out).table
    assert sorted(set(table.groups.tolist()))[:2] == ["000", "001"]
    assert set(table.labels.tolist()) == {0, 1, 2}


def test_limit_takes_some_of_every_class(config) -> None:
    assert embed(config(limit=6))["num_embedded"] == 6
    table = Cache.open(config().out).table
    assert set(table.labels.tolist()) == {0, 1, 2}
    summary = embed(config())
    assert (summary["num_computed"], summary["num_dropped"]) == (42, 0)
    with pytest.raises(ConfigError, match=r"--limit 6 would narrow .*, which has 48 images"):
        embed(config(limit=6))


def test_images_that_drop_out_are_counted(config, image_folder: Path, tmp_path: Path) -> None:
    embed(config())
    shutil.copytree(image_folder / "train", tmp_path / "other")
    summary = embed(config(images=tmp_path / "other"))  # other names: someone may have meant to add them
    assert (summary["num_dropped"], summary["num_computed"]) == (48, 0)
    assert "48 images of the previous revision are not among these any more" in describe(summary)


def test_dry_run_writes_nothing_and_knows_what_is_known(config) -> None:
    summary = embed(config(dry_run=True))
    assert (summary["num_pending"], summary["num_images"]) == (48, 48)
    assert summary["images_per_second"] > 0
    assert "Nothing was written" in describe(summary)
    assert not config().out.exists()
    embed(config(limit=6))
    before = sorted(config().out.rglob("*"))
    assert embed(config(dry_run=True))["num_pending"] == 42
    assert sorted(config().out.rglob("*")) == before
    embed(config())
    assert "nothing would be computed" in describe(embed(config(dry_run=True)))


def test_input_that_cannot_be_used_leaves_nothing_behind(config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for fields, error in [
        ({"images": tmp_path / "absent"}, InputError),
        ({"backbone": str(tmp_path / "absent")}, InputError),
        ({"out": tmp_path / "file"}, StorageError),
    ]:
        with pytest.raises(error):
            embed(config(**fields))
    assert not config().out.exists()


def test_a_folder_that_is_something_else_becomes_no_cache(config, image_folder: Path, tmp_path: Path) -> None:
    before = sorted(image_folder.iterdir())
    with pytest.raises(InputError, match="holds the images"):
        embed(config(out=image_folder))
    assert sorted(image_folder.iterdir()) == before
    run = tmp_path / "run"
    run.mkdir()
    for name in ("manifest.json", "metrics.json"):
        (run / name).write_text("{}")
    with pytest.raises(InputError, match="is a run folder"):
        embed(config(out=run))


def test_nothing_readable_is_an_error_that_says_why(config, tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / "bad" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bad" / name).write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(InputError, match=r"none of 2 images could be read: a/1\.png: format"):
            embed(config(images=tmp_path / "bad"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"shard_index": 2, "num_shards": 2}, "--shard-index must be from 0 to 1"),
        ({"limit": 0}, "--limit"),
        ({"max_failures": -1}, "--max-failures"),
    ],
)
def test_options_that_make_no_sense(fields, message, config) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**fields)


def test_a_full_device_is_an_error_with_advice() -> None:
    advice = r"a batch of 8 images does not fit.*smaller --batch-size and another"
    with pytest.raises(OutOfMemoryError, match=advice), memory_explained(8):
        jax.block_until_ready(jnp.zeros(1 << 46, jnp.float32))
    with pytest.raises(ZeroDivisionError), memory_explained(8):
        assert 1 / 0


class TestEmbedShard:
    """The unit of work, with a backbone whose embedding is a picture's first two pixels."""

    @staticmethod
    def shard(values: list, *, known: tuple[int, ...] = (), dtype: str = "float32", batch_size: int = 3):
        """`values` are the brightnesses of pictures, or failures; 250 embeds to infinity and 200 to 1e5."""
        shapes: list[tuple[int, ...]] = []

        def run_batch(images: np.ndarray) -> dict[str, jax.Array]:
            shapes.append(images.shape)
            value = jnp.asarray(images[:, 0, :2, 0], jnp.float32)
            return {"pooler": jnp.where(value == 250, jnp.inf, jnp.where(value == 200, 1e5, value))}

        def loaded(index: int, value: int | ImageError) -> LoadedImage[Item]:
            item = Item(0, Example(b"%d" % index, (), None, None, 7, 8))
            if isinstance(value, ImageError):
                return LoadedImage(item, None, None, value)
            key = bytes([value]) * 32
            return LoadedImage(item, key, np.full((2, 2, 3), value, np.uint8), None)

        contents = embed_shard(
            (loaded(index, value) for index, value in enumerate(values)),
            run_batch,
            batch_size=batch_size,
            dtype=dtype,
            is_known=lambda key: key[0] in known,
        )
        assert set(shapes) <= {(batch_size, 2, 2, 3)}
        return contents

    def test_duplicates_known_and_failed_images(self) -> None:
        bad = ImageError("truncated", "ends early")
        contents = self.shard([1, 2, bad, 1, 5, 3, 5, 4, 9], known=(5,))
        assert contents.facts.rows.tolist() == [0, 1, FAILED, 0, KNOWN, 2, KNOWN, 3, 4]
        np.testing.assert_array_equal(contents.embeddings["pooler"], [[v, v] for v in (1, 2, 3, 4, 9)])
        assert contents.keys[:, 0].tolist() == [1, 2, 3, 4, 9]
        assert [(failure.name, failure.reason) for failure in contents.failures] == [(b"2", "truncated")]
        assert contents.facts.keys[2].tolist() == [0] * 32

    @pytest.mark.parametrize(
        ("dtype", "reasons"),
        [("float32", ["non-finite"] * 2), ("float16", ["non-finite"] * 2 + ["overflow"])],
    )
    def test_an_embedding_that_cannot_be_stored_is_a_failure(self, dtype: str, reasons: list[str]) -> None:
        contents = self.shard([1, 250, 2, 250, 200, 3], dtype=dtype)
        assert sorted(failure.reason for failure in contents.failures) == sorted(reasons)
        assert np.isfinite(contents.embeddings["pooler"]).all()
        assert contents.embeddings["pooler"].dtype == dtype
        stored = [1, 2, 3] if dtype == "float16" else [1, 2, 1e5, 3]
        assert contents.embeddings["pooler"][:, 0].tolist() == stored
        rows = contents.facts.rows.tolist()
        assert (rows[1], rows[3]) == (FAILED, FAILED)
        assert [contents.embeddings["pooler"][row, 0] for row in rows if row >= 0] == stored

    def test_the_device_has_the_next_batches_before_one_is_fetched(self) -> None:
        """And never more than three, whatever the number of images: that is the memory they take."""
        events: list[tuple[str, int]] = []

        class Output:
            def __init__(self, number: int) -> None:
                self.number = number

            def is_ready(self) -> bool:
                return False

            def __array__(self, dtype=None, copy=None) -> np.ndarray:
                events.append(("fetched", self.number))
                return np.zeros((3, 2), np.float32)

        def run_batch(images: np.ndarray) -> dict:
            number = sum(kind == "sent" for kind, _ in events)
            events.append(("sent", number))
            return {"pooler": Output(number)}

        images = (
            LoadedImage(
                Item(0, Example(b"%d" % i, (), None, None, 7, 8)), bytes([i]) * 32, np.zeros((2, 2, 3), np.uint8), None
            )
            for i in range(31)
        )
        embed_shard(images, run_batch, batch_size=3, dtype="float32", is_known=lambda key: False)
        in_flight = 0
        for position, (kind, number) in enumerate(events):
            in_flight += 1 if kind == "sent" else -1
            assert 0 <= in_flight <= 3
            if kind == "fetched" and number < 9:
                assert ("sent", number + 2) in events[:position]
        assert [number for kind, number in events if kind == "fetched"] == list(range(11))

    def test_nothing_new_is_an_empty_shard(self) -> None:
        contents = self.shard([5, 5], known=(5,))
        assert len(contents.keys) == 0
        assert contents.facts.rows.tolist() == [KNOWN, KNOWN]
