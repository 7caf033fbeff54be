"""A training as a run of Weights & Biases, offline: files in a folder, which `wandb sync` uploads if one wants to."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probe.errors import ConfigError, StorageError

_PROJECT = "probe"


class WandbRun:
    """A new offline run of the project "probe"; see `probe.training.logs.Log`."""

    def __init__(self, folder: Path, name: str, options: Mapping[str, Any]) -> None:
        """
        Args:
          folder: wandb/offline-run-… is made in it. options: JSON values, kept as the run's config.
        Raises: ConfigError where wandb is not installed; StorageError.
        """
        wandb = import_wandb()
        self._folder = folder
        # Output, code and the state of a repository are none of its business, and its messages are not for stdout.
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, save_code=False, disable_job_creation=True
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=_PROJECT,
                name=name,
                dir=os.fspath(folder.absolute()),
                config=dict(options),
                mode="offline",
                reinit="create_new",
                settings=settings,
            )
        except (OSError, wandb.Error) as err:
            raise self._error(err) from err

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds figures at a step; wandb's own process writes them. Raises: StorageError."""
        import wandb

        try:
            self._run.log({**figures, "step": step})
        except (OSError, wandb.Error) as err:
            raise self._error(err) from err

    def attach(self, page: Path) -> None:
        """Keeps a page among the run's media, under its name. Raises: StorageError."""
        import wandb

        try:
            self._run.log({page.stem: wandb.Html(os.fspath(page), inject=False)})
        except (OSError, wandb.Error) as err:
            raise self._error(err) from err

    def close(self, *, failed: bool) -> None:
        """Ends the run; wandb's own process may write for a moment longer, and is waited for when this one ends."""
        self._run.finish(exit_code=int(failed))

    def _error(self, err: Exception) -> StorageError:
        return StorageError(f"{self._folder}: cannot write a run of Weights & Biases: {err}")


def import_wandb() -> Any:
    """The package, without its reports of errors. Raises: ConfigError where it is not installed."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError:
        raise ConfigError("--wandb needs one more package: pip install 'probe-jax[wandb]'") from None
    return wandb
