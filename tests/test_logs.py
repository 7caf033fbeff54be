"""Runs of MLflow and of Weights & Biases, read back from what lies on the disk. pip install '.[mlflow,wandb]'"""

import contextlib
import json
import struct
import sys
import time
import zlib

import numpy as np
import pytest

from probe.cache import write_cache
from probe.cli import main
from probe.config import FinetuneConfig, FitLinearConfig
from probe.errors import NumericalError, StorageError
from probe.finetune import finetune
from probe.linear import fit_linear
from probe.training.logs import TAGS, Logs
from probe.training.train import Epoch

# MLflow's models, as SQLAlchemy 2.1 sees them
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture
def config(image_folder, tiny_clip, tmp_path):
    def make(**options):
        return FinetuneConfig(
            images=image_folder,
            backbone=str(tiny_clip),
            out=tmp_path / "my run",
            init="zeros",
            backbone_lr=0.0,
            epochs=2,
            checkpoint_every=0,
            num_workers=1,
            no_report=True,
            **options,
        )

    return make


def read_wandb(folder):
    """The records of the one offline run in a folder, once its end is there: wandb's own process may write on for a
    moment after the run has been finished."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        records = records_of(path)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def records_of(path):
    """Those that are there so far, each checked against its sum, as LevelDB's log has them."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, content, records = path.read_bytes(), 7, b"", []
    assert data[:4] in (b":W&B", b"")
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block is filled up
            at += 2**15 - at % 2**15
            continue
        found, size, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + size > len(data):
            break  # yet to come
        part = data[at + 7 : at + 7 + size]
        assert found == zlib.crc32(part, zlib.crc32(bytes([kind])))
        content += part
        at += 7 + size
        if kind in (1, 4):  # the whole of a record, or its last part
            records.append(Record.FromString(content))
            content = b""
    return records


def test_mlflow_gets_the_epochs_the_options_and_the_end(config, tmp_path, capfd):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    metrics = finetune(config(mlflow=str(tmp_path / "tracking")))
    assert "Creating initial MLflow database tables" not in capfd.readouterr().err
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'tracking' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("probe")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("my run", "FINISHED")
    assert run.data.params["epochs"] == "2"
    assert "mlflow" not in run.data.params
    for tag, field in TAGS.items():
        told = {point.step: point.value for point in client.get_metric_history(run.info.run_id, tag)}
        assert told == {line["step"]: line[field] for line in metrics["history"]}
    assert run.data.metrics["kept/test_accuracy"] == metrics["splits"]["test"]["accuracy"]
    assert sorted(path.name for path in (tmp_path / "tracking").iterdir()) == ["mlflow.db"]


@pytest.fixture
def head_config(tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(40) % 2
    embeddings = (rng.normal(size=(40, 6)) + labels[:, None]).astype(np.float32)
    splits = ["train", "train", "test", "test"] * 10
    write_cache(tmp_path / "cache", embeddings, labels=labels, class_names=("a", "b"), splits=splits)

    def make(**options):
        return FitLinearConfig(cache=tmp_path / "cache", out=tmp_path / "my run", penalties=(1.0, 0.1), **options)

    return make


def test_mlflow_gets_the_curve_of_a_head_and_its_report(head_config, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    metrics = fit_linear(head_config(mlflow=str(tmp_path / "tracking")))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'tracking' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("probe").experiment_id])
    assert (run.info.run_name, run.info.status) == ("my run", "FINISHED")
    points = metrics["curves"][0]["points"]
    for figure in points[0]:
        told = client.get_metric_history(run.info.run_id, f"choice/pooler-standard/{figure}")
        assert [point.value for point in told] == [point[figure] for point in points]
    assert run.data.metrics["kept/test_accuracy"] == metrics["splits"]["test"]["accuracy"]
    (page,) = (tmp_path / "tracking" / "artifacts").rglob("report.html")
    assert page.read_bytes() == (tmp_path / "my run" / "report.html").read_bytes()


def test_wandb_gets_the_curve_of_a_head_and_its_report(head_config, tmp_path):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    metrics = fit_linear(head_config(wandb=tmp_path / "tracking"))
    lines = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in read_wandb(tmp_path / "tracking")
        if record.WhichOneof("record_type") == "history"
    ]
    told = [line["choice/pooler-standard/nll"] for line in lines if "choice/pooler-standard/nll" in line]
    assert told == [point["nll"] for point in metrics["curves"][0]["points"]]
    assert any(line.get("kept/test_accuracy") == metrics["splits"]["test"]["accuracy"] for line in lines)
    (page,) = (tmp_path / "tracking").rglob("*.html")
    assert page.read_bytes() == (tmp_path / "my run" / "report.html").read_bytes()


def test_a_training_that_fails_is_told_so(config, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    with contextlib.suppress(NumericalError), Logs(config(mlflow=str(tmp_path / "tracking"))) as logs:
        logs.start()
        logs.write(Epoch(1, 10, 0.5, 0.5, 0.5, 0.5, 1.0))
        raise NumericalError("training loss is nan")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'tracking' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("probe").experiment_id])
    assert run.info.status == "FAILED"


def test_wandb_gets_the_epochs_the_options_and_the_end(config, tmp_path, capfd):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    metrics = finetune(config(wandb=tmp_path / "tracking"))
    assert "wandb" not in capfd.readouterr().out
    records = read_wandb(tmp_path / "tracking")
    kinds = [record.WhichOneof("record_type") for record in records]
    assert kinds[-1] == "exit" or "exit" in kinds
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    assert (run.project, run.display_name) == ("probe", "my run")
    lines = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            lines.append(items)
    epochs = [line for line in lines if "loss/train" in line]
    for tag, field in TAGS.items():
        told = {line["step"]: line[tag] for line in epochs}
        assert told == pytest.approx({line["step"]: line[field] for line in metrics["history"]})
    assert lines[-1]["kept/test_accuracy"] == metrics["splits"]["test"]["accuracy"]


def test_all_at_once_from_the_command_line(config, image_folder, tiny_clip, tmp_path):
    for name in ("mlflow", "wandb", "tensorboardX"):
        pytest.importorskip(name, reason=f"the package {name} is not installed")
    asked = [word for name in ("mlflow", "wandb", "tensorboard") for word in (f"--{name}", str(tmp_path / name))]
    options = ["--backbone", str(tiny_clip), "--epochs", "1", "--no-report", "--quiet"]
    assert main(["finetune", str(image_folder), *options, *asked, "--out", str(tmp_path / "run")]) == 0
    assert all(list((tmp_path / name).iterdir()) for name in ("mlflow", "wandb", "tensorboard"))


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_place_that_cannot_be_written(name, config, tmp_path):
    pytest.importorskip(name, reason=f"the extra {name} is not installed")
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "tracking"
    with (
        pytest.raises(StorageError, match="file/tracking: cannot write"),
        Logs(config(**{name: place if name == "wandb" else str(place)})) as logs,
    ):
        logs.start()


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_without_the_package_it_says_what_to_install(name, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    options = ["--backbone", "b", "--out", str(tmp_path / "run"), f"--{name}", str(tmp_path / "tracking")]
    assert main(["finetune", str(image_folder), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"pip install 'probe-jax[{name}]'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_mistake_leaves_no_empty_run(config, tmp_path):
    """Nothing is opened before training begins."""
    with pytest.raises(ZeroDivisionError), Logs(config(tensorboard=tmp_path / "events")):
        np.divide(1, 1 // 0)
    assert not (tmp_path / "events").exists()
