"""A training as a run of MLflow: in a SQLite file in a folder, or wherever a tracking URI points.

The extra `mlflow` is mlflow-skinny with what its SQLite store needs. Its client is called directly, since the functions
of the module act on a run that is current in the whole process.
"""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probe.errors import ConfigError, StorageError

_EXPERIMENT = "probe"
_LONGEST = 500  # characters of an option that are kept: MLflow's own limit in older stores


class MlflowRun:
    """A new run of the experiment "probe"; see `probe.training.logs.Log`."""

    def __init__(self, store: str, name: str, options: Mapping[str, Any]) -> None:
        """
        Args:
          store: a folder, in which mlflow.db is made or continued; or a tracking URI.
          options: JSON values, kept as the run's parameters.
        Raises: ConfigError where mlflow is not installed; StorageError.
        """
        mlflow = import_mlflow()
        self._entities = mlflow.entities
        self._store = store
        try:
            files = None  # where reports go: as the server there says
            if "://" not in store:
                folder = Path(store).absolute()
                folder.mkdir(parents=True, exist_ok=True)
                store, files = f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()
            self._client = mlflow.MlflowClient(tracking_uri=store)
            found = self._client.get_experiment_by_name(_EXPERIMENT)
            experiment = found.experiment_id if found else self._client.create_experiment(_EXPERIMENT, files)
            self._run = self._client.create_run(experiment, run_name=name).info.run_id
            params = [
                self._entities.Param(option, str(value)[:_LONGEST])
                for option, value in options.items()
                if value is not None
            ]
            self._client.log_batch(self._run, params=params)
        except Exception as err:  # its own, SQLAlchemy's, an HTTP library's: they have no common ground
            raise self._error(err) from err

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds figures at a step. Raises: StorageError."""
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in figures.items()]
        try:
            self._client.log_batch(self._run, metrics=metrics)
        except Exception as err:
            raise self._error(err) from err

    def attach(self, page: Path) -> None:
        """Keeps a page among the run's artifacts. Raises: StorageError."""
        try:
            self._client.log_artifact(self._run, os.fspath(page))
        except Exception as err:
            raise self._error(err) from err

    def close(self, *, failed: bool) -> None:
        """Ends the run, as finished or failed."""
        try:
            self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")
        except Exception as err:
            if not failed:  # else something worse is on its way already
                raise self._error(err) from err

    def _error(self, err: Exception) -> StorageError:
        reason = str(err).partition("\n")[0]
        return StorageError(f"{self._store}: cannot write to MLflow's store: {reason}")


def import_mlflow() -> Any:
    """The package, without its telemetry. Raises: ConfigError where it is not installed."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        import mlflow
        import mlflow.entities
        import sqlalchemy  # noqa: F401  without it the store would be said to be unsupported
    except ImportError:
        raise ConfigError("--mlflow needs more packages: pip install 'probe-jax[mlflow]'") from None
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)  # how it makes its tables is nobody's business
    return mlflow
