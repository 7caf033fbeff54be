"""`probe finetune`, and the laws that tie the full mode to the head-only mode."""

import csv
import dataclasses
import functools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from probe import bundle
from probe.backbones import load_backbone
from probe.config import EmbedConfig, FinetuneConfig, FitLinearConfig
from probe.embed import embed
from probe.errors import ConfigError, InputError, MismatchError
from probe.finetune import describe, finetune
from probe.heads import Classifier, TrainedHead
from probe.linear import fit_linear
from probe.sources import open_source
from probe.training import optim, steps
from probe.training.decoded import ImageRows
from probe.training.full import make_apply_fn
from probe.training.start import embed_rows
from tests.conftest import write_image_folder


@pytest.fixture(params=["tiny_clip", "tiny_resnet"])
def backbone(request):
    return load_backbone(str(request.getfixturevalue(request.param)))


def classifier_of(backbone, num_classes=3):
    """apply_fn, parameters and state of a classifier with a random head."""
    classifier = Classifier(num_classes, backbone.module)
    rng = np.random.default_rng(1)
    head = {
        "kernel": rng.normal(size=(backbone.width, num_classes)).astype(np.float32),
        "bias": np.zeros(num_classes, np.float32),
    }
    state = {name: {"backbone": leaf} for name, leaf in backbone.variables.items() if name != "params"}
    return (
        make_apply_fn(classifier, backbone.preprocessing),
        {"backbone": backbone.variables["params"], "head": head},
        state,
    )


def random_images(backbone, num):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (num, *backbone.preprocessing.image_size, 3), np.uint8), np.arange(num) % 3


def head_only(params, model_state, inputs, key):
    return inputs @ params["head"]["kernel"] + params["head"]["bias"], model_state


def test_a_frozen_backbone_equals_head_only_mode(backbone):
    """The same batches through the same step, once as images and once as embeddings."""
    apply_fn, params, state = classifier_of(backbone)
    images, labels = random_images(backbone, 10)
    embeddings = np.asarray(backbone.apply(backbone.variables, images).pooler_output)
    tx = optax.adam(1e-2)
    full = steps.TrainState.create({"head": params["head"]}, tx, seed=0, model_state=state)
    head = steps.TrainState.create({"head": params["head"]}, tx, seed=0)
    full_step, head_step = steps.make_train_step(apply_fn, tx), steps.make_train_step(head_only, tx)
    for pixels, features in zip(
        steps.padded_batches(images, labels, 4), steps.padded_batches(embeddings, labels, 4), strict=True
    ):
        full, full_sums = full_step(full, {"backbone": params["backbone"]}, pixels)
        head, head_sums = head_step(head, {}, features)
        np.testing.assert_allclose(full_sums.nll_sum, head_sums.nll_sum, rtol=1e-5)
    # Adam divides by the gradient's own size, so float error in a gradient near 0 is of the order of the
    # rate.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), full.params, head.params)


def flops(step, *args):
    return step.lower(*args).compile().cost_analysis()["flops"]


def test_a_frozen_backbone_costs_no_more_than_inference(backbone):
    """On the compiled programs: no gradient of a backbone weight is computed, no moments of it are kept."""
    apply_fn, params, state = classifier_of(backbone)
    images, labels = random_images(backbone, 4)
    tx, batch = optax.adam(1e-3), steps.padded_batch(images, labels, 4, examples=np.arange(len(labels)))
    frozen = {"backbone": params["backbone"]}
    inference = flops(jax.jit(functools.partial(apply_fn, key=None)), params, state, images)
    whole = steps.TrainState.create(params, tx, seed=0, model_state=state)
    head = steps.TrainState.create({"head": params["head"]}, tx, seed=0, model_state=state)
    step = steps.make_train_step(apply_fn, tx)
    # The head's own gradient and Adam are some 50 operations per head weight.
    head_work = 50 * sum(leaf.size for leaf in jax.tree.leaves(params["head"]))
    assert inference < flops(step, head, frozen, batch) < inference + head_work
    assert flops(step, whole, {}, batch) > 2 * inference
    assert len(jax.tree.leaves(head.opt_state)) == 1 + 2 * 2


def test_frozen_weights_are_not_constants_of_the_program(backbone):
    """A program with its weights baked in would be compiled again for every backbone, and hold them twice."""
    apply_fn, params, state = classifier_of(backbone)
    images, labels = random_images(backbone, 4)
    tx, batch = optax.adam(1e-3), steps.padded_batch(images, labels, 4, examples=np.arange(len(labels)))
    step = steps.make_train_step(apply_fn, tx)
    head = steps.TrainState.create({"head": params["head"]}, tx, seed=0, model_state=state)
    memory = step.lower(head, {"backbone": params["backbone"]}, batch).compile().memory_analysis()
    used = {name: leaf for name, leaf in params["backbone"].items() if name != "visual_projection"}
    assert memory.argument_size_in_bytes > sum(leaf.nbytes for leaf in jax.tree.leaves(used))


def test_a_batch_size_of_evaluation_does_not_matter(backbone):
    apply_fn, params, state = classifier_of(backbone)
    images, labels = random_images(backbone, 7)
    step = steps.make_eval_step(apply_fn)
    one, _ = steps.predict_logits(step, params, {}, state, steps.padded_batches(images, labels, 1))
    four, _ = steps.predict_logits(step, params, {}, state, steps.padded_batches(images, labels, 4))
    np.testing.assert_allclose(one, four, atol=1e-4)


@pytest.fixture
def config(image_folder, tiny_clip, tmp_path):
    return FinetuneConfig(
        images=image_folder,
        backbone=str(tiny_clip),
        out=tmp_path / "run",
        init="zeros",
        checkpoint_every=0,
        epochs=3,
        batch_size=8,
        head_lr=0.1,
        backbone_lr=1e-3,
        num_workers=1,
    )


def test_a_run_is_whole_and_learns(config):
    metrics = finetune(config)
    assert metrics["splits"]["test"]["accuracy"] == 1.0
    assert [metrics["splits"][name]["n"] for name in ("train", "val", "test")] == [30, 6, 12]
    assert json.loads((config.out / "metrics.json").read_text()) == metrics
    history = list(csv.DictReader((config.out / "history.csv").read_text().splitlines()))
    assert [line["epoch"] for line in history] == ["1", "2", "3"]
    assert float(history[-1]["train_loss"]) < float(history[0]["train_loss"])
    run = bundle.load(config.out)
    assert run.finetuned
    tuned, original = run.load_backbone(), load_backbone(config.backbone)
    assert tuned.fingerprint != original.fingerprint
    # Only the projection stayed: it stands after the pooler, and decay must not melt what no gradient holds.
    same = jax.tree.map(
        lambda a, b: bool(np.array_equal(a, b)), tuned.variables["params"], original.variables["params"]
    )
    moved_paths = {jax.tree_util.keystr(path) for path, equal in jax.tree_util.tree_leaves_with_path(same) if equal}
    assert moved_paths == {"['visual_projection']['kernel']"}
    assert "accuracy 1.0000" in describe(metrics)


def test_frozen_patterns_stay_bit_equal_and_the_rest_moves(config):
    finetune(dataclasses.replace(config, freeze=("backbone/encoder/layers_0", "**/bias"), epochs=1))
    tuned = bundle.load(config.out).load_backbone().variables["params"]
    original = load_backbone(config.backbone).variables["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(tuned):
        name = "/".join(key.key for key in path)
        before = original
        for key in path:
            before = before[key.key]
        stays = name.startswith(("encoder/layers_0/", "visual_projection/")) or name.endswith("/bias")
        assert np.array_equal(leaf, before) == stays, name


@pytest.mark.parametrize("options", [{"freeze": ("backbone",), "backbone_lr": None}, {"backbone_lr": 0.0}])
def test_a_run_with_a_frozen_backbone_only_refers_to_it(config, options):
    metrics = finetune(dataclasses.replace(config, **options))
    run = bundle.load(config.out)
    assert not run.finetuned
    assert not (config.out / "backbone").exists()
    assert run.backbone.fingerprint == load_backbone(config.backbone).fingerprint
    assert [part["label"] for part in metrics["parts"]] == ["frozen", "frozen", 0.1]


def test_two_classes_and_batch_statistics(tmp_path, tiny_resnet):
    images = write_image_folder(tmp_path / "images", {"train": 8, "val": 4}, classes=("blue", "red"))
    config = FinetuneConfig(
        images=images,
        backbone=str(tiny_resnet),
        out=tmp_path / "run",
        epochs=2,
        batch_size=8,
        head_lr=0.05,
        num_workers=1,
    )
    metrics = finetune(config)
    assert set(metrics["splits"]) == {"train", "val"}
    assert metrics["val_is_given"]
    run = bundle.load(config.out)
    assert run.head.params["bias"].shape == (1,)
    tuned, original = run.load_backbone(), load_backbone(str(tiny_resnet))
    jax.tree.map(np.testing.assert_array_equal, tuned.variables["batch_stats"], original.variables["batch_stats"])


def test_the_probe_is_kept_unless_fine_tuning_beats_it(config):
    """The probe is right on all of these easy pictures, so that nothing can beat it."""
    config = dataclasses.replace(config, init="probe", epochs=2)
    metrics = finetune(config)
    assert metrics["verdict"]["kept"] == "probe"
    assert metrics["verdict"]["n"] == metrics["splits"]["val"]["n"] == 6
    assert metrics["verdict"]["probe"]["accuracy"] == 1.0
    assert metrics["probe"]["solution"]["converged"]
    assert [point["alpha"] for point in metrics["wise_curve"]] == [step / 10 for step in range(11)]
    run = bundle.load(config.out)
    assert not run.finetuned
    text = describe(metrics)
    assert "against the probe" in text
    assert "saved: probe, which fine-tuning does not beat" in text
    tuned = config.out.with_name("tuned")
    metrics = finetune(dataclasses.replace(config, out=tuned, keep="finetuned", wise="0.5"))
    assert [point["alpha"] for point in metrics["wise_curve"]] == [step / 10 for step in range(11)]
    assert metrics["verdict"]["kept"] == "finetuned"
    assert metrics["chosen_alpha"] == 0.5
    assert bundle.load(tuned).finetuned


def test_what_is_saved_where_no_way_helps_is_called_the_probe(config):
    """A rate that ruins the tower: validation chooses α 0, and to keep what is there is to keep the probe."""
    ruined = dataclasses.replace(config, init="probe", epochs=1, backbone_lr=10.0, keep="finetuned")
    metrics = finetune(ruined)
    assert metrics["chosen_alpha"] == metrics["chosen_epoch"] == 0
    assert metrics["verdict"]["kept"] == "probe"
    assert not bundle.load(config.out).finetuned
    assert "saved: probe, since validation chose α 0 (--wise off overrides)" in describe(metrics)
    metrics = finetune(dataclasses.replace(ruined, wise="off", overwrite=True))
    assert metrics["verdict"]["kept"] == "finetuned"
    assert bundle.load(config.out).finetuned


def test_the_probe_takes_embeddings_from_a_cache_that_matches(config, tiny_resnet, tmp_path):
    made = {"precision": "float32", "batch_size": 8, "num_workers": 1}  # not what is fastest here today
    embed(EmbedConfig(images=config.images, backbone=config.backbone, out=tmp_path / "cache", **made))
    backbone = load_backbone(config.backbone)
    images = ImageRows.decode(open_source(config.images), backbone.preprocessing, num_workers=1)
    rows = np.array([5, 0, 30])
    computed = embed_rows(backbone, images, rows, batch_size=8, cache=None)
    blank = dataclasses.replace(images, pixels=np.zeros_like(images.pixels))  # so that only the cache can know
    cached = embed_rows(backbone, blank, rows, batch_size=8, cache=tmp_path / "cache")
    np.testing.assert_allclose(cached, computed, atol=1e-5)
    config = dataclasses.replace(config, init="probe", backbone=str(tiny_resnet), cache=tmp_path / "cache")
    with pytest.raises(MismatchError, match=r"--cache .*: made with backbone"):
        finetune(config)


def test_validation_rows_have_no_part_in_the_probe(tmp_path, tiny_clip):
    """With their labels exchanged the start is the same, to the bit."""
    images = write_image_folder(tmp_path / "images", {"train": 12, "val": 4})
    heads = []
    for turn in range(2):
        out = tmp_path / f"run-{turn}"
        options = {"epochs": 1, "wise": "0", "keep": "finetuned", "checkpoint_every": 0, "num_workers": 1}
        metrics = finetune(FinetuneConfig(images=images, backbone=str(tiny_clip), out=out, **options))
        assert metrics["verdict"]["why"] == "which is α 0, as asked"
        heads.append(bundle.load(out).head.params)
        (images / "val" / "red").rename(images / "val" / "rest")
        (images / "val" / "blue").rename(images / "val" / "red")
        (images / "val" / "rest").rename(images / "val" / "blue")
    jax.tree.map(np.testing.assert_array_equal, *heads)


def test_dropout_acts_in_training_alone(tiny_clip):
    backbone = load_backbone(str(tiny_clip))
    dropping = dataclasses.replace(backbone, config=dataclasses.replace(backbone.config, attention_dropout=0.5))
    images, _ = random_images(backbone, 4)

    def logits(of, key):
        apply_fn, params, state = classifier_of(of)
        return np.asarray(apply_fn(params, state, images, key)[0])

    first, second = (logits(dropping, jax.random.key(seed)) for seed in (0, 1))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(first, logits(dropping, jax.random.key(0)))
    np.testing.assert_array_equal(logits(dropping, None), logits(backbone, None))
    np.testing.assert_allclose(logits(backbone, jax.random.key(0)), logits(backbone, None), atol=1e-6)


def test_eight_devices_give_the_same_run(config, tmp_path):
    """The whole verb, weights divided over the devices, with a cached prefix: the losses of one device."""
    one = finetune(dataclasses.replace(config, unfreeze_last=1, cache_prefix="off"))
    eight = subprocess.run(
        arguments(dataclasses.replace(config, out=tmp_path / "eight"), "--fsdp", "--unfreeze-last", "1", "--json"),
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(eight.stdout)
    assert found["cached_prefix"] == {"num_blocks": 1, "num_views": 1}
    for line, other in zip(found["history"], one["history"], strict=True):
        for loss in ("train_loss", "val_loss"):
            assert line[loss] == pytest.approx(other[loss], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wise": "0.5"}, "--wise must be best or off with --init zeros"),
        ({"cache": "c"}, "--cache must be left out with --init zeros"),
        ({"resume": True}, "--checkpoint-every must be above 0 with --resume"),
        ({"cache_prefix": ""}, "--cache-prefix must be auto, off or a folder"),
        ({"views": 0}, "--views must be at least 1"),
    ],
)
def test_options_that_would_do_nothing_are_errors(config, options, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **options)


@pytest.mark.parametrize("option", ["tensorboard", "mlflow", "wandb", "cache_prefix"])
def test_nothing_else_is_written_within_the_run_folder(config, option):
    """It is written when all is done: the run could not be saved any more, or would replace what was written there."""
    for within in (config.out, config.out / "logs" / "here", config.out.parent / "x" / ".." / "run"):
        with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} .* is within --out .*, which is written"):
            dataclasses.replace(config, **{option: str(within) if option in ("mlflow", "cache_prefix") else within})
    beside = config.out.with_name("runs")
    dataclasses.replace(config, **{option: str(beside) if option in ("mlflow", "cache_prefix") else beside})
    dataclasses.replace(config, mlflow="https://there/run", cache_prefix="auto", out=config.out.with_name("auto"))
    if option != "cache_prefix":
        with pytest.raises(ConfigError, match=f"--{option} run/here is within --out run, which is written whole"):
            FitLinearConfig(cache=config.out, out=Path("run"), **{option: "run/here"})


def test_everything_at_once(config):
    """Augmentation, SGD, clipping, accumulation, averaging, bfloat16, rematerialisation: one run that learns."""
    options = {
        "crop_scale": (0.7, 1.0), "flip": 0.5, "brightness": 0.1, "mixup": 0.2, "label_smoothing": 0.1,
        "optimizer": "sgd", "clip_norm": 1.0, "accumulate": 2, "average": 0.9, "patience": 5,
        "precision": "bfloat16", "remat": True, "layer_decay": 0.5,
    }  # fmt: skip
    metrics = finetune(dataclasses.replace(config, **options, epochs=4, backbone_lr=0.01))
    assert metrics["history"][-1]["val_loss"] < metrics["history"][0]["val_loss"] < np.log(3)


def test_batch_statistics_are_trained_where_asked_for(config, tiny_resnet):
    resnet = dataclasses.replace(config, backbone=str(tiny_resnet), backbone_lr=None, train_batchnorm=True, epochs=1)
    finetune(resnet)
    tuned = bundle.load(config.out).load_backbone().variables["batch_stats"]
    original = load_backbone(str(tiny_resnet)).variables["batch_stats"]
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(tuned), jax.tree.leaves(original), strict=True))
    with pytest.raises(ConfigError, match="has no batch norm"):
        finetune(dataclasses.replace(config, out=config.out.with_name("other"), train_batchnorm=True))


def test_another_image_size_is_saved_with_the_run(config):
    """Even with everything frozen: the resized positions exist nowhere else."""
    finetune(dataclasses.replace(config, image_size=24, backbone_lr=0.0, epochs=1))
    backbone = bundle.load(config.out).load_backbone()
    assert backbone.preprocessing.image_size == (24, 24)
    assert backbone.variables["params"]["embeddings"]["position_embedding"].shape == (1 + 9, 16)


def arguments(config, *more):
    options = ["--init", "zeros", "--epochs", "3", "--batch-size", "8", "--head-lr", "0.1", "--backbone-lr", "1e-3"]
    paths = [str(config.images), "--backbone", config.backbone, "--out", str(config.out), "--num-workers", "1"]
    return [sys.executable, "-m", "probe.cli", "finetune", *paths, *options, *more]


def newest_step(checkpoints):
    """Of the checkpoints in a folder; -1 where there is none."""
    return max((int(path.name.split("-")[2]) for path in checkpoints.glob("0*-step-*")), default=-1)


def test_a_run_killed_and_stopped_goes_on_to_the_same_bits(config, tmp_path):
    """kill -9 at a random step, then SIGTERM at a later one, in a run of 12 steps and 3 epochs."""
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    first_run = subprocess.run(arguments(whole), check=True, capture_output=True, text=True)
    rows = [line for line in first_run.stderr.splitlines() if "│" in line]
    assert any("backbone" in row and "0.001" in row for row in rows)  # the table of parts and their rates
    assert any("head" in row and " 51 " in row and "0.1" in row for row in rows)
    checkpoints, rng = config.out.with_name("run.checkpoints"), random.Random()
    kill_at = rng.randint(1, 6)
    process = subprocess.Popen(arguments(config, "--checkpoint-every", "1"), stderr=subprocess.DEVNULL)
    while newest_step(checkpoints) < kill_at and process.poll() is None:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1))  # into a step, or into the next checkpoint
    process.kill()
    process.wait()
    assert not config.out.exists(), kill_at
    with pytest.raises(InputError, match="go on with it by --resume"):
        finetune(config)
    step = newest_step(checkpoints)
    command = arguments(config, "--checkpoint-every", "1000", "--resume")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while newest_step(checkpoints) == step and process.poll() is None:  # the end of an epoch
        time.sleep(0.002)
    process.terminate()
    _, err = process.communicate()
    if process.returncode:  # else it was through already
        assert process.returncode == 143, err
        assert f"step-{newest_step(checkpoints)}" in err
        assert newest_step(checkpoints) > step
        subprocess.run(command, check=True, capture_output=True)
    assert not checkpoints.exists()
    for name in ("head.safetensors", "backbone/model.safetensors"):
        assert (config.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_to_go_on_with_a_run_that_has_ended_is_to_do_nothing(config, capsys):
    """As a scheduler asks for when a process dies between the saving and its exit."""
    config = dataclasses.replace(config, epochs=1, checkpoint_every=1000)
    metrics = finetune(config)

    def files():
        return {path: path.read_bytes() for path in config.out.rglob("*.[jsc]*") if path.is_file()}

    before = files()
    (config.out / "report.html").unlink()
    leftover = config.out.with_name("run.checkpoints")
    leftover.mkdir()
    capsys.readouterr()
    again = finetune(dataclasses.replace(config, resume=True, num_workers=2))
    assert "this run has ended; there is nothing to go on with" in capsys.readouterr().err
    assert again == json.loads(json.dumps(metrics))
    assert describe(again) == describe(metrics)
    assert not leftover.exists()
    assert (config.out / "report.html").exists()
    assert files() == before
    with pytest.raises(InputError, match="exists already"):
        finetune(dataclasses.replace(config, resume=True, epochs=2))


def test_the_same_seed_gives_the_same_run(config, tmp_path):
    first, second = (finetune(dataclasses.replace(config, out=tmp_path / name, epochs=1)) for name in ("a", "b"))
    for metrics in (first, second):
        for line in metrics["history"]:
            del line["seconds"]
    assert first == second
    assert (tmp_path / "a" / "head.safetensors").read_bytes() == (tmp_path / "b" / "head.safetensors").read_bytes()


def saved_head(config, out, **changes):
    """A run whose head is random, as `fit-linear` would save it."""
    backbone = load_backbone(config.backbone)
    rng = np.random.default_rng(5)
    values = {
        "head": TrainedHead(
            (), {"kernel": rng.normal(size=(16, 3)).astype(np.float32), "bias": np.ones(3, np.float32)}
        ),
        "class_names": ("blue", "green", "red"),
        "view": "pooler",
        "backbone": bundle.BackboneReference(name=backbone.name, revision=None, fingerprint=backbone.fingerprint),
        "preprocessor_config": backbone.preprocessing.to_config(),
        "config": {},
        "metrics": {},
    } | changes
    bundle.save(out, **values)
    return values["head"]


def test_the_head_starts_from_another_run(config, tmp_path):
    head = saved_head(config, tmp_path / "head")
    finetune(
        dataclasses.replace(config, init=str(tmp_path / "head"), backbone_lr=0.0, head_lr=1e-9, epochs=1, wise="off")
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        bundle.load(config.out).head.params,
        head.params,
    )


def test_a_head_that_does_not_fit_is_refused_with_all_reasons(config, tmp_path):
    wrong = bundle.BackboneReference(name="other", revision=None, fingerprint="0" * 64)
    saved_head(config, tmp_path / "head", class_names=("cat", "dog", "eel"), view="projected", backbone=wrong)
    with pytest.raises(MismatchError) as err:
        finetune(dataclasses.replace(config, init=str(tmp_path / "head")))
    assert "its classes are ['cat', 'dog', 'eel'], those of" in str(err.value)
    assert "view 'projected'" in str(err.value)
    assert "it stands on 'other' (000000000000)" in str(err.value)
    assert not config.out.exists()


@pytest.mark.parametrize("leaf", ["bank", "unit_norm"])
def test_a_head_that_is_no_stack_of_layers_is_refused(config, tmp_path, leaf):
    layers = {"kernel": np.zeros((16, 3), np.float32), "bias": np.zeros(3, np.float32)}
    saved_head(config, tmp_path / "head", head=TrainedHead((), {**layers, leaf: np.ones(1, np.float32)}))
    with pytest.raises(MismatchError, match="its head is a vote of neighbours, or divides embeddings by their norm"):
        finetune(dataclasses.replace(config, init=str(tmp_path / "head")))


def test_an_mlp_head_is_trained_on(config, tmp_path):
    """From a run of `fit-linear --head mlp` on the same images: its hidden layers come along, and are saved."""
    cache, mlp = tmp_path / "cache", tmp_path / "mlp"
    embed(EmbedConfig(images=config.images, backbone=config.backbone, out=cache, num_workers=1))
    fit_linear(FitLinearConfig(cache=cache, out=mlp, head="mlp", hidden=(8, 4), epochs=5))
    metrics = finetune(dataclasses.replace(config, init=str(mlp), head_lr=1e-3, epochs=1))
    assert {part["pattern"]: part["num_parameters"] for part in metrics["parts"]}["head"] == 17 * 8 + 9 * 4 + 5 * 3
    start, end = bundle.load(mlp).head, bundle.load(config.out).head
    assert end.hidden == start.hidden == (8, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), start.params, end.params)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (start.params, end.params)), strict=True))
    # its epoch was chosen on these validation rows: there is no figure on them
    assert metrics["splits"]["val"]["accuracy"] is None
    assert metrics["verdict"] == {
        "kept": "finetuned",
        "why": "there is no probe of the training rows alone to compare with",
    }


def test_a_manifest_with_columns_of_its_own(config, image_folder, tmp_path):
    rows = [
        f"{path.relative_to(image_folder)},{path.parent.name},{'val' if path.stem > '008' else 'train'},{path.stem}"
        for path in sorted((image_folder / "train").rglob("*.png"))
    ]
    (tmp_path / "list.csv").write_text("\n".join(["photo,colour,part,patient", *rows]))
    columns = {"path_column": "photo", "label_column": ("colour",), "split_column": "part", "group_column": "patient"}
    config = dataclasses.replace(config, images=tmp_path / "list.csv", image_root=image_folder, epochs=1, **columns)
    metrics = finetune(config)
    assert [metrics["splits"][name]["n"] for name in ("train", "val")] == [27, 9]
    assert bundle.load(config.out).class_names == ("blue", "green", "red")
    with pytest.raises(InputError, match="no column color; there are"):
        finetune(dataclasses.replace(config, overwrite=True, label_column=("color",)))


def test_several_labels_an_image_are_refused(config, image_folder, tmp_path):
    (tmp_path / "list.csv").write_text(f"path,blue,dark\n{image_folder}/train/blue/000.png,1,0\n")
    with pytest.raises(InputError, match="fine-tuning takes one label each"):
        finetune(dataclasses.replace(config, images=tmp_path / "list.csv", label_column=("blue", "dark")))


def test_an_unreadable_image_is_left_out_and_reported(config):
    (config.images / "train" / "blue" / "000.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    metrics = finetune(dataclasses.replace(config, epochs=1))
    assert [failure["path"] for failure in metrics["failures"]] == ["train/blue/000.png"]
    assert metrics["splits"]["train"]["n"] + metrics["splits"]["val"]["n"] == 35
    assert "1 images could not be read" in describe(metrics)
    with pytest.raises(InputError, match=r"train/blue/000\.png: .*--on-error skip"):
        finetune(dataclasses.replace(config, out=config.out.with_name("other"), on_error="fail"))


def test_nothing_to_train_is_an_error(config):
    with pytest.raises(ConfigError, match="everything is frozen"):
        finetune(dataclasses.replace(config, freeze=("**",), backbone_lr=None, head_lr=None))


def test_a_pattern_that_matches_nothing_is_an_error(config):
    with pytest.raises(ConfigError, match="rules without a parameter: backbone/layers_0; the parameters are"):
        finetune(dataclasses.replace(config, freeze=("backbone/layers_0",)))


def test_a_folder_that_exists_is_kept(config):
    config.out.mkdir()
    (config.out / "precious").touch()
    with pytest.raises(InputError, match="exists already"):
        finetune(config)


def test_rules_cover_every_parameter_of_both_towers(backbone):
    params = {"backbone": backbone.variables["params"], "head": {"kernel": np.zeros((2, 2))}}
    labels = optim.partition(params, {"backbone": 1e-5, "head": 1e-3})
    assert jax.tree.structure(labels) == jax.tree.structure(params)
