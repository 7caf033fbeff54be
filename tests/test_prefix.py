"""The frozen prefix, cached: the same training; computed once, killed and continued; refused where it may not be."""

import dataclasses
import json
import subprocess
import sys
import time

import pytest

from probe import bundle
from probe.config import FinetuneConfig
from probe.errors import ConfigError, CorruptError, MismatchError, StorageError
from probe.finetune import finetune
from probe.training.activations import Activations
from probe.training.prefix import remove_activations
from tests.conftest import write_image_folder


@pytest.fixture
def config(tiny_clip, tmp_path):
    return FinetuneConfig(
        images=write_image_folder(tmp_path / "images", {"train": 9, "val": 4, "test": 2}),
        backbone=str(tiny_clip),
        out=tmp_path / "run",
        init="zeros",
        checkpoint_every=0,
        epochs=3,
        batch_size=8,
        head_lr=0.1,
        backbone_lr=1e-3,
        unfreeze_last=1,
        num_workers=1,
    )


def with_and_without(config, tmp_path, cached="auto"):
    """metrics.json and weights of one run whose frozen blocks were cached and of one whose were not."""
    runs = []
    for cache_prefix in (cached, "off"):
        out = tmp_path / f"run-{cache_prefix.replace('/', '-')}"
        metrics = finetune(dataclasses.replace(config, out=out, cache_prefix=cache_prefix))
        runs.append((metrics, bundle.load(out).load_backbone().variables, bundle.load(out).head.params))
    assert runs[0][0]["cached_prefix"] is not None
    assert runs[1][0]["cached_prefix"] is None
    return runs


def assert_same_training(runs, rtol):
    cached, plain = (metrics["history"] for metrics, *_ in runs)
    for line, other in zip(cached, plain, strict=True):
        for loss in ("train_loss", "val_loss"):
            assert line[loss] == pytest.approx(other[loss], rel=rtol)
    for split in ("train", "val", "test"):
        figures = [metrics["splits"][split]["nll"] for metrics, *_ in runs]
        assert figures[0] == pytest.approx(figures[1], rel=rtol)
    assert cached[-1]["train_loss"] < cached[0]["train_loss"]


def test_the_same_losses_as_without_the_cache(config, tmp_path):
    runs = with_and_without(config, tmp_path)
    assert runs[0][0]["cached_prefix"] == {"num_blocks": 1, "num_views": 1}
    assert_same_training(runs, 1e-5)  # two programs of the same sums
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "run-auto", "run-off"]


def test_the_same_losses_of_a_resnet_cut_within_a_stage(config, tiny_resnet, tmp_path):
    runs = with_and_without(dataclasses.replace(config, backbone=str(tiny_resnet), backbone_lr=1e-4), tmp_path)
    assert runs[0][0]["cached_prefix"] == {"num_blocks": 2, "num_views": 1}
    assert_same_training(runs, 1e-5)


def test_the_same_losses_with_augmented_views(config, tmp_path):
    """Both see the same two pictures of each image in turn; smoothed targets, accumulation and averaging go along."""
    options = {"flip": 0.5, "crop_scale": (0.5, 1.0), "brightness": 0.3, "label_smoothing": 0.1}
    config = dataclasses.replace(config, **options, views=2, accumulate=2, average=0.5)
    runs = with_and_without(config, tmp_path)
    assert runs[0][0]["cached_prefix"] == {"num_blocks": 1, "num_views": 2}
    assert_same_training(runs, 1e-5)
    drawn_anew = finetune(dataclasses.replace(config, out=tmp_path / "anew", views=None))
    losses = [[line["train_loss"] for line in metrics["history"]] for metrics in (runs[1][0], drawn_anew)]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2] != losses[1][2]  # the third epoch has the first one's pictures again, or new ones


def test_a_resnet_whose_blocks_are_all_frozen_has_no_parameters_left(config, tiny_resnet, tmp_path):
    config = dataclasses.replace(config, backbone=str(tiny_resnet), unfreeze_last=None, backbone_lr=0.0)
    runs = with_and_without(config, tmp_path)
    assert runs[0][0]["cached_prefix"]["num_blocks"] == 3
    assert_same_training(runs, 1e-5)


def test_the_head_alone_trains_on_what_the_pooler_reads(config, tmp_path):
    folder = tmp_path / "activations"
    config = dataclasses.replace(config, unfreeze_last=None, backbone_lr=0.0, precision="bfloat16")
    runs = with_and_without(config, tmp_path, str(folder))
    assert runs[0][0]["cached_prefix"] == {"num_blocks": 2, "num_views": 1}
    assert_same_training(runs, 1e-5)  # operands are rounded at the same places
    records = [json.loads((folder / name / "activations.json").read_text()) for name in ("train", "plain")]
    assert [record["compute_dtype"] for record in records] == ["bfloat16", "float32"]
    assert [record["shape"] for record in records] == [[1, 16]] * 2


def test_a_folder_is_found_again_and_told_apart(config, tmp_path, capsys):
    config = dataclasses.replace(config, epochs=1, cache_prefix=str(tmp_path / "activations"))
    finetune(config)
    assert "computing the activations after the 1 frozen of 2 blocks once, of 27 training images" in (
        capsys.readouterr().err
    )
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "activations").rglob("*.h5")}
    assert len(shards) == 2
    finetune(dataclasses.replace(config, overwrite=True, head_lr=0.2))  # who learns how fast does not matter
    assert f"blocks are cached in {tmp_path / 'activations'}" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "activations").rglob("*.h5")} == shards
    with pytest.raises(MismatchError, match=r"Fields that differ: num_rows is 27 there and 21 now; rows"):
        finetune(
            dataclasses.replace(config, overwrite=True, images=write_image_folder(tmp_path / "b", {"": 9}, seed=1))
        )
    (path,) = (tmp_path / "activations" / "plain").glob("*.h5")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=f"{path.name}: damaged .*Remove it and run the same command again"):
        finetune(dataclasses.replace(config, overwrite=True))
    path.unlink()
    finetune(dataclasses.replace(config, overwrite=True))
    assert set((tmp_path / "activations").rglob("*.h5")) == set(shards)  # their names hold their hashes


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"unfreeze_last": None}, "the first block of the backbone learns"),
        ({"mixup": 0.2, "views": 2}, "mixup and CutMix make each picture anew of two"),
        ({"flip": 0.5}, "augmentation makes each picture anew; --views N would fix N"),
        ({"train_batchnorm": True, "backbone": "tiny_resnet"}, "--train-batchnorm moves the statistics"),
        ({"backbone": "dropout"}, "the backbone has dropout"),
    ],
)
def test_what_changes_from_epoch_to_epoch_cannot_be_cached(config, options, why, tiny_resnet, tmp_path, request):
    if options.get("backbone") == "tiny_resnet":
        options = {**options, "backbone": str(tiny_resnet)}
    if options.get("backbone") == "dropout":
        folder = tmp_path / "dropout"
        folder.mkdir()
        source = request.getfixturevalue("tiny_clip")
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        fields = json.loads((source / "config.json").read_text()) | {"attention_dropout": 0.1}
        (folder / "config.json").write_text(json.dumps(fields))
        options = {**options, "backbone": str(folder)}
    with pytest.raises(ConfigError, match=f"--cache-prefix {tmp_path}/x: nothing stays the same.*{why}"):
        finetune(dataclasses.replace(config, cache_prefix=str(tmp_path / "x"), **options))
    assert not (tmp_path / "x").exists()


def test_views_of_nothing_are_an_error(config):
    with pytest.raises(ConfigError, match="--views 2 cannot act"):
        finetune(dataclasses.replace(config, views=2))


def test_a_disk_without_room(config, capsys, monkeypatch):
    """/proc has no room for anything. Where nobody asked for the cache, training goes on without it."""
    with pytest.raises(StorageError, match=r"/proc/x: the activations of the frozen blocks take 0\.\d MB, and 0\.0 MB"):
        finetune(dataclasses.replace(config, cache_prefix="/proc/x"))
    assert not config.out.exists()
    usage = __import__("shutil").disk_usage("/proc")
    monkeypatch.setattr("probe.training.prefix.shutil.disk_usage", lambda path: usage)
    metrics = finetune(dataclasses.replace(config, epochs=2))
    assert metrics["cached_prefix"] is None
    assert "the 1 frozen blocks are computed in every epoch: " in capsys.readouterr().err


SMALL_SHARDS = """
import sys
from probe.cli import main
from probe.training import activations
activations.SHARD_BYTES = 2000  # 6 rows
sys.exit(main(sys.argv[1:]))
"""


def arguments(config, *more):
    options = ["--init", "zeros", "--epochs", "2", "--batch-size", "8", "--unfreeze-last", "1", "--head-lr", "0.1"]
    paths = [str(config.images), "--backbone", config.backbone, "--out", str(config.out), "--num-workers", "1"]
    return [sys.executable, "-c", SMALL_SHARDS, "finetune", *paths, *options, *more]


def test_killed_at_building_and_at_training_it_goes_on_to_the_same_bits(config, tmp_path):
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    subprocess.run(arguments(whole), check=True, capture_output=True)
    prefix, checkpoints = tmp_path / "run.prefix", tmp_path / "run.checkpoints"
    command = arguments(config, "--checkpoint-every", "1", "--resume")
    kill_when(command, lambda: len(list(prefix.glob("train/*.h5"))) >= 1)
    built = {path: path.stat().st_mtime_ns for path in prefix.rglob("*.h5")}
    assert 1 <= len(built) <= 8
    kill_when(command, lambda: len(list(checkpoints.glob("0*-step-*"))) >= 2)
    assert len(list(prefix.rglob("*.h5"))) == 8  # 27 and 18 rows
    assert built.items() <= {path: path.stat().st_mtime_ns for path in prefix.rglob("*.h5")}.items()
    options = {"backbone_lr": None, "epochs": 2, "checkpoint_every": 1, "resume": True}
    with pytest.raises(MismatchError, match="record cached_blocks: the checkpoint has 1, this run 0"):
        finetune(dataclasses.replace(config, **options, cache_prefix="off"))
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "blocks are cached in" in done.stderr
    assert not prefix.exists()
    assert not checkpoints.exists()
    for name in ("head.safetensors", "backbone/model.safetensors"):
        assert (config.out / name).read_bytes() == (whole.out / name).read_bytes()


def kill_when(command, is_time):
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not is_time():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()


def test_activations_of_another_run_beside_out_are_made_anew(config, capsys):
    """What a killed run left where nobody named a folder is no obstacle to another run."""
    folder = config.out.with_name("run.prefix")
    finetune(dataclasses.replace(config, epochs=1, cache_prefix=str(folder), seed=1, flip=0.5, views=1))
    assert len(list(folder.rglob("*.h5"))) == 2
    assert finetune(dataclasses.replace(config, overwrite=True, epochs=2))["cached_prefix"] is not None
    assert "computing the activations" in capsys.readouterr().err
    assert not folder.exists()


def test_only_activations_are_removed(tmp_path):
    table = Activations(tmp_path / "run.prefix" / "plain", {}, num_rows=1, shape=(2,))
    table.create()
    theirs = tmp_path / "run.prefix" / "train" / "holiday.jpg"
    theirs.parent.mkdir()
    theirs.touch()
    remove_activations(tmp_path / "run.prefix")
    assert [path for path in (tmp_path / "run.prefix").rglob("*") if path.is_file()] == [theirs]
    remove_activations(tmp_path / "absent")
