"""What a new cache settles by measurement: precision and batch size, fixed in it and read by all who continue."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from probe import creation
from probe.backbones import Backbone, Precision, int8_precision, load_backbone, make_embed_fn
from probe.cache import Cache
from probe.cli import main
from probe.config import EmbedConfig, PredictConfig
from probe.creation import choose, least_cosine
from probe.embed import embed
from probe.errors import ConfigError, MismatchError
from probe.predict import predict
from tests.checkpoints import write_tiny_clip
from tests.conftest import write_image_folder
from tests.test_inference import cosines, pictures

SCRIPT = Path(__file__).with_name("embedded_run.py")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(write_tiny_clip(tmp_path_factory.mktemp("creation") / "clip"))


def settings(images: Path, backbone: Path, out: Path, **fields) -> EmbedConfig:
    return EmbedConfig(images=images, backbone=str(backbone), out=out, num_workers=1, **fields)


def test_what_is_given_is_taken_without_measuring(clip, monkeypatch) -> None:
    monkeypatch.setattr(creation, "_seconds", None)
    assert choose(clip, "bfloat16", 7) == creation.Choice(Precision("bfloat16"), 7, "")


def test_auto_takes_bfloat16_only_where_it_is_near_enough(clip, monkeypatch) -> None:
    monkeypatch.setattr(creation, "_FASTER", 0.0)
    monkeypatch.setattr(creation, "_IDLE_SECONDS", 0.0)
    monkeypatch.setattr(creation, "LEAST_COSINE", 0.9)
    near = choose(clip, "auto", 4)
    assert (near.precision.name, near.batch_size) == ("bfloat16", 4)
    assert "times as fast as float32 here, cosine to it at least 0.99" in near.why
    monkeypatch.setattr(creation, "LEAST_COSINE", 1 - 1e-9)
    far = choose(clip, "auto", 4)
    assert far.precision == Precision("float32")
    assert "but its cosine to float32 is 0.99" in far.why


def test_auto_keeps_float32_where_bfloat16_has_no_cosine_to_it(clip, monkeypatch) -> None:
    """A NaN is below no threshold, and is not near."""
    monkeypatch.setattr(creation, "_FASTER", 0.0)
    monkeypatch.setattr(creation, "_IDLE_SECONDS", 0.0)
    params = jax.tree.map(np.array, clip.variables["params"])
    params["post_layernorm"]["bias"][0] = np.nan
    broken = Backbone(clip.name, None, clip.config, {"params": params}, clip.preprocessing)
    assert np.isnan(least_cosine(broken, Precision(), Precision("bfloat16"), pictures(3, (16, 16))))
    chosen = choose(broken, "auto", 4)
    assert chosen.precision == Precision("float32")
    assert "but its cosine to float32 is nan" in chosen.why


def test_the_smallest_batch_that_is_near_the_best_rate_is_taken(clip, monkeypatch) -> None:
    seconds = {8: 0.09, 16: 0.161, 32: 0.32}  # 89, 99.4 and 100 images/s
    monkeypatch.setattr(creation, "_seconds", lambda stages, backbone, size: seconds[size])
    chosen = choose(clip, "float32", None)
    assert chosen.batch_size == 16
    assert chosen.why == "batches of 16, 99 images/s (8: 89, 16: 99, 32: 100)"


def test_a_batch_that_memory_does_not_hold_ends_the_search(clip, monkeypatch) -> None:
    def seconds(stages: object, backbone: object, size: int) -> float:
        if size > 8:
            jax.block_until_ready(jax.numpy.zeros(1 << 46))
        return size * 0.1

    monkeypatch.setattr(creation, "_seconds", seconds)
    assert choose(clip, "float32", None).batch_size == 8
    monkeypatch.undo()
    monkeypatch.setattr(creation, "_MEMORY_SHARE", 0.0)
    assert choose(clip, "float32", None).batch_size == 1


def test_processes_that_must_agree_do_not_measure(clip) -> None:
    chosen = choose(clip, "auto", None, measure=False)
    assert (chosen.precision.name, chosen.batch_size) == ("float32", 32)
    assert "must agree" in chosen.why


def test_precisions_that_are_not_there_are_said(clip, tiny_resnet) -> None:
    with pytest.raises(ConfigError, match="--precision tf32: only GPUs have it"):
        choose(clip, "tf32", 4)
    chosen = choose(load_backbone(tiny_resnet), "int8", 4)
    assert chosen.precision.name in ("float32", "bfloat16")
    assert chosen.why.startswith("int8 has no convolutions; ")


def with_outliers(backbone: Backbone, factor: float, *, into_mlp: bool) -> Backbone:
    """Channels that are `factor` times as large as others, as trained towers have them.

    They come out of a norm's gain, or out of the MLP's first layer.
    """
    params = jax.tree.map(np.array, backbone.variables["params"])
    for layer in params["encoder"].values():
        if into_mlp:
            layer["mlp"]["fc1"]["bias"][3] += factor
            layer["mlp"]["fc2"]["kernel"][3] *= 0.1 / factor
        else:
            layer["layer_norm1"]["scale"][5] *= factor
            layer["layer_norm2"]["scale"][2] *= factor
            for name in ("q_proj", "k_proj", "v_proj"):
                layer["self_attn"][name]["kernel"][5] *= 1 / factor
            layer["mlp"]["fc1"]["kernel"][2] *= 1 / factor
    return Backbone(backbone.name, None, backbone.config, {"params": params}, backbone.preprocessing)


@pytest.mark.parametrize("into_mlp", [False, True])
def test_int8_bears_outlier_channels(clip, into_mlp: bool) -> None:
    planted = with_outliers(clip, 300.0, into_mlp=into_mlp)
    images = pictures(8, (16, 16))
    exact = make_embed_fn(planted, ("pooler",))(images)["pooler"]
    assert cosines(make_embed_fn(planted, ("pooler",), int8_precision(planted))(images)["pooler"], exact).min() >= 0.999


def test_products_that_int8_would_spoil_stay_in_bfloat16(clip, monkeypatch) -> None:
    monkeypatch.setattr("probe.backbones.calibration._MOST_LOSS", 0.0)
    everything = int8_precision(clip)
    assert set(everything.in_bfloat16) == {
        f"layers_{index}/{name}" for index in range(2) for name in ("qkv", "out", "fc1", "fc2")
    }
    images = pictures(4, (16, 16))
    ours, bfloat16 = (
        make_embed_fn(clip, ("pooler",), each)(images)["pooler"] for each in (everything, Precision("bfloat16"))
    )
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(bfloat16))
    assert least_cosine(clip, Precision(), everything, images) >= 0.9999


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_a_cache_fixes_its_precision_and_runs_remember_it(name: str, tiny_clip: Path, tmp_path: Path) -> None:
    images = write_image_folder(tmp_path / "images", {"train": 6, "test": 2})
    out = tmp_path / "cache"
    embed(settings(images, tiny_clip, out, precision=name, batch_size=4, limit=9))
    embed(settings(images, tiny_clip, out))  # goes on as the cache says
    cache = Cache.open(out)
    assert cache.provenance["precision"]["name"] == name
    with pytest.raises(MismatchError, match=rf'precision.name is "{name}" there and "float32" now'):
        embed(settings(images, tiny_clip, out, precision="float32"))
    assert main(["fit-linear", str(out), "--out", str(tmp_path / "run")]) == 0
    predicted = predict(PredictConfig(run=tmp_path / "run", images=(images / "test",), batch_size=4))
    backbone = load_backbone(tiny_clip)
    from probe import bundle
    from probe.heads import class_logits

    classifier = bundle.load(tmp_path / "run")
    rows = [row for row, split in enumerate(cache.table.splits) if split == "test"]
    expected = jax.nn.softmax(class_logits(classifier.head.apply(cache.embeddings("pooler", np.array(rows)))))
    ours = np.array([line["probabilities"] for line in predicted["predictions"]])
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert classifier.backbone.precision == cache.provenance["precision"]
    assert backbone.fingerprint == classifier.backbone.fingerprint


def test_a_cache_of_a_tower_without_int8_is_continued_by_the_command_that_made_it(tiny_resnet, tmp_path: Path) -> None:
    images = write_image_folder(tmp_path / "images", {"train": 3})
    made = settings(images, tiny_resnet, tmp_path / "cache", precision="int8", batch_size=4, limit=6)
    assert embed(made)["num_computed"] == 6
    assert embed(dataclasses.replace(made, limit=None))["num_computed"] == 3


def test_a_new_cache_says_what_was_chosen_and_why(image_folder, tiny_clip, tmp_path, capsys) -> None:
    summary = embed(settings(image_folder, tiny_clip, tmp_path / "cache"))
    told = capsys.readouterr().err
    assert f"chosen for {tmp_path / 'cache'}: " in told
    assert f"batches of {summary['batch_size']}" in told
    assert re.search(r"; measured in \d+\.\d s$", told, re.MULTILINE)
    embed(settings(image_folder, tiny_clip, tmp_path / "cache"))
    assert "chosen for" not in capsys.readouterr().err


def test_what_is_measured_with_waits_for_no_pipe(image_folder, tiny_clip, tmp_path) -> None:
    os.mkfifo(image_folder / "train" / "blue" / "000.jpg")  # the first of all, into which nobody writes
    summary = embed(settings(image_folder, tiny_clip, tmp_path / "cache"))
    assert [failure["reason"] for failure in summary["failures"]] == ["not-a-file"]
    assert summary["num_embedded"] == 48


def run_on(num_devices: int, *arguments: str) -> str:
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}"}
    command = [sys.executable, "-m", "tests.embedded_run", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_eight_devices_give_the_embeddings_of_one(tiny_clip: Path, tmp_path: Path) -> None:
    images = write_image_folder(tmp_path / "images", {"train": 5})
    one, eight = (run_on(num, str(images), str(tiny_clip), str(tmp_path / f"{num}")) for num in (1, 8))
    assert (one.strip(), eight.strip()) == ("1", "8")
    first, second = (Cache.open(tmp_path / f"{num}") for num in (1, 8))
    assert list(first.table.names) == list(second.table.names)
    np.testing.assert_allclose(first.embeddings("pooler"), second.embeddings("pooler"), rtol=1e-5, atol=1e-6)
    with pytest.raises(MismatchError, match="num_devices is 8 there and 1 now"):
        embed(settings(images, tiny_clip, tmp_path / "8"))


LOGGED = """
import logging, sys
logging.basicConfig()
logging.getLogger("jax._src.compiler").setLevel(logging.DEBUG)
from probe.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_second_process_compiles_nothing(image_folder: Path, tiny_clip: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "home"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def log_of(name: str) -> str:
        command = [sys.executable, "-c", LOGGED, "embed", str(image_folder), "--backbone", str(tiny_clip)]
        command += ["--precision", "float32", "--batch-size", "8", "--num-workers", "1", "--out", str(tmp_path / name)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr

    hit = "Persistent compilation cache hit for 'jit_program"
    assert [hit in log_of(name) for name in ("first", "second")] == [False, True]
    tag = (tmp_path / "home" / "probe" / "CACHEDIR.TAG").read_text()
    assert tag.startswith("Signature: 8a477f597d28d172789f06886806bc55")  # by which backups know a cache
    (tmp_path / "file").write_text("")
    environment["XDG_CACHE_HOME"] = str(tmp_path / "file")  # where no folder can be made, nothing is kept
    assert "cache" not in log_of("third").replace("/cache", "")
