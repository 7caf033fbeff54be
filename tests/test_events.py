"""TensorBoard's event files, read back record by record, as TensorBoard does."""

import struct
import subprocess
import sys

import numpy as np
import pytest

from probe.cache import write_cache
from probe.config import FinetuneConfig, FitLinearConfig
from probe.errors import StorageError
from probe.finetune import finetune
from probe.linear import fit_linear
from probe.training.events import EventFile

pytest.importorskip("tensorboardX", reason="the extra tensorboard is not installed")


def crc32c(data):
    """Castagnoli's CRC, bit by bit, as TFRecord masks it."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    value ^= 0xFFFFFFFF
    return (((value >> 15) | (value << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(path):
    """{tag: {step: value}} of an event file, every record checked against its sums."""
    from tensorboardX.proto.event_pb2 import Event

    data, at, figures, first = path.read_bytes(), 0, {}, True
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        (size_sum,) = struct.unpack_from("<I", data, at + 8)
        content = data[at + 12 : at + 12 + size]
        (content_sum,) = struct.unpack_from("<I", data, at + 12 + size)
        assert size_sum == crc32c(data[at : at + 8])
        assert content_sum == crc32c(content)
        event = Event.FromString(content)
        if first:
            assert event.file_version == "brain.Event:2"
            first = False
        for value in event.summary.value:
            figures.setdefault(value.tag, {})[event.step] = value.simple_value
        at += 16 + size
    return figures


def test_figures_are_on_the_disk_when_they_are_written(tmp_path):
    events = EventFile(tmp_path / "new" / "folder")
    for count in (1, 2):
        events.write(10 * count, {"loss/train": 0.5 / count, "accuracy/validation": 0.5 + count / 10})
        (path,) = (tmp_path / "new" / "folder").iterdir()
        assert len(read_events(path)["loss/train"]) == count
    events.close(failed=False)
    figures = read_events(path)
    assert figures["loss/train"] == {10: 0.5, 20: 0.25}
    assert figures["accuracy/validation"] == {10: pytest.approx(0.6), 20: pytest.approx(0.7)}
    again = EventFile(tmp_path / "new" / "folder")  # a run that goes on, within the same second
    again.write(30, {"loss/train": 0.1})
    again.close(failed=True)
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 2


def test_a_run_writes_what_its_history_says(image_folder, tiny_clip, tmp_path):
    config = FinetuneConfig(
        images=image_folder,
        backbone=str(tiny_clip),
        out=tmp_path / "run",
        init="zeros",
        backbone_lr=0.0,
        epochs=2,
        checkpoint_every=0,
        num_workers=1,
        tensorboard=tmp_path / "events",
    )
    metrics = finetune(config)
    history = metrics["history"]
    (path,) = (tmp_path / "events").iterdir()
    figures = read_events(path)
    for tag, field in (("loss/train", "train_loss"), ("accuracy/validation", "val_accuracy")):
        assert figures[tag] == {line["step"]: pytest.approx(line[field], rel=1e-6) for line in history}
    assert figures["kept/test_accuracy"] == {history[-1]["step"]: pytest.approx(metrics["splits"]["test"]["accuracy"])}


@pytest.mark.parametrize("head", ["linear", "mlp", "knn"])
def test_a_head_writes_how_it_was_chosen(head, tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(40) % 2
    embeddings = (rng.normal(size=(40, 6)) + labels[:, None]).astype(np.float32)
    splits = ["train", "train", "test", "test"] * 10
    write_cache(tmp_path / "cache", embeddings, labels=labels, class_names=("a", "b"), splits=splits)
    options = {"mlp": {"hidden": (4,), "epochs": 2}, "linear": {"penalties": (1.0, 0.1)}}.get(head, {})
    options |= {"cache": tmp_path / "cache", "out": tmp_path / "run", "tensorboard": tmp_path / "events"}
    metrics = fit_linear(FitLinearConfig(head=head, no_report=True, **options))
    (path,) = (tmp_path / "events").iterdir()
    figures = read_events(path)
    if head == "mlp":
        assert figures["loss/train"] == {
            line["step"]: pytest.approx(line["train_loss"], rel=1e-6) for line in metrics["history"]
        }
    else:
        points, name = metrics["curves"], "choice"
        if head == "linear":
            points, name = points[0]["points"], "choice/pooler-standard"
        assert points
        for figure in points[0]:
            assert figures[f"{name}/{figure}"] == {
                step: pytest.approx(point[figure], rel=1e-6) for step, point in enumerate(points, 1)
            }
    (kept,) = figures["kept/test_accuracy"].values()
    assert kept == pytest.approx(metrics["splits"]["test"]["accuracy"])


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/events: cannot write TensorBoard's events: Not a directory"):
        EventFile(tmp_path / "file" / "events")


def test_without_the_package_it_says_what_to_install(image_folder, tmp_path):
    code = f"""
import sys
sys.modules["tensorboardX"] = None  # as if it were not installed
from probe.cli import main
sys.exit(main(["finetune", {str(image_folder)!r}, "--backbone", "b", "--out", "o", "--tensorboard", "t"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == ("probe: error: --tensorboard needs one more package: pip install 'probe-jax[tensorboard]'\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
