"""Where the figures of a training go besides history.csv: TensorBoard, MLflow, Weights & Biases, all on this machine.

Each is an extra of its own, and a class with `write` for figures, `attach` for the report, and `close`. Nothing is
opened before training begins, so that a mistake in the options leaves no empty run behind.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from probe.config import FinetuneConfig, FitLinearConfig, to_json
from probe.training.events import EventFile, import_tensorboardx
from probe.training.mlflow_store import MlflowRun, import_mlflow
from probe.training.train import Epoch
from probe.training.wandb_run import WandbRun, import_wandb

_NOT_TOLD = ("tensorboard", "mlflow", "wandb", "json", "quiet")
_FIGURES = ("accuracy", "balanced_accuracy", "macro_f1", "nll", "expected_calibration_error")

TAGS = {  # what an epoch's figures are called, everywhere
    "loss/train": "train_loss",
    "loss/validation": "val_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/validation": "val_accuracy",
    "seconds": "seconds",
}


class Log(Protocol):
    """One such place, open."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds figures at a step. Raises: StorageError."""

    def attach(self, page: Path) -> None:
        """Keeps a copy of a page of HTML, where there is a place for one. Raises: StorageError."""

    def close(self, *, failed: bool) -> None:
        """Ends it; `failed` where training did not come to its end."""


class Logs:
    """Those that a config asks for.

    with Logs(config) as logs:
        logs.start()
        logs.write(epoch)  # or, of a head that is not trained by epochs, logs.curves(metrics)
        logs.end(metrics)
        logs.attach(page)
    """

    def __init__(self, config: FinetuneConfig | FitLinearConfig) -> None:
        """Raises: ConfigError where a package is not installed."""
        self._config = config
        self._open: list[Log] = []
        self._step = 0
        for asked, need in (
            (config.tensorboard, import_tensorboardx),
            (config.mlflow, import_mlflow),
            (config.wandb, import_wandb),
        ):
            if asked is not None:
                need()

    def start(self) -> None:
        """Opens them, in the first of several processes; in the others nothing is open. Raises: StorageError."""
        config = self._config
        options = {name: value for name, value in to_json(config).items() if name not in _NOT_TOLD}
        if config.tensorboard is not None:
            self._open.append(EventFile(config.tensorboard))
        if config.mlflow is not None:
            self._open.append(MlflowRun(config.mlflow, config.out.name, options))
        if config.wandb is not None:
            self._open.append(WandbRun(config.wandb, config.out.name, options))

    def write(self, line: Epoch) -> None:
        """Tells the figures of an epoch, at its last step."""
        self._step = line.step
        self._tell({tag: float(getattr(line, field)) for tag, field in TAGS.items()})

    def curves(self, metrics: dict[str, Any]) -> None:
        """Tells how a head was chosen: the epochs of an MLP, else each λ, or number of neighbours, as a step."""
        for line in metrics.get("history", []):
            self.write(Epoch(**line))
        for curve in metrics.get("curves", []):
            if "points" not in curve:  # k-NN has one curve
                self._choices("choice", metrics["curves"])
                break
            about = "-".join(str(value) for name, value in curve.items() if name != "points")
            self._choices(f"choice/{about}", curve["points"])

    def _choices(self, name: str, points: Sequence[Mapping[str, float | None]]) -> None:
        for number, point in enumerate(points, 1):
            self._step = number
            self._tell({f"{name}/{figure}": float(value) for figure, value in point.items() if value is not None})

    def end(self, metrics: dict[str, Any]) -> None:
        """Tells the figures of the classifier that was kept, as metrics.json has them."""
        figures = {
            f"kept/{split}_{name}": float(value)
            for split, of_split in metrics["splits"].items()
            for name in _FIGURES
            if (value := of_split.get(name)) is not None
        }
        self._tell(figures)

    def attach(self, page: Path) -> None:
        """Hands a page of HTML over, if it was written."""
        if page.is_file():
            for log in self._open:
                log.attach(page)

    def _tell(self, figures: Mapping[str, float]) -> None:
        for log in self._open:
            log.write(self._step, figures)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.ExitStack() as all_of_them:  # also where one cannot be closed
            for log in self._open:
                all_of_them.callback(log.close, failed=kind is not None)
