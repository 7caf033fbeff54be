"""What TensorBoard shows of a training: an event file with the figures of each epoch, as it ends.

Written by tensorboardX, the extra `tensorboard`: 0.7 MB that needs neither TensorFlow nor PyTorch. Its file writer is
called directly, since its SummaryWriter writes in a thread, which a full disk would end without a word.
"""

import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probe.errors import ConfigError, StorageError


class EventFile:
    """A new event file in a folder; see `probe.training.logs.Log`."""

    def __init__(self, folder: Path) -> None:
        """Raises: ConfigError where tensorboardX is not installed; StorageError."""
        self._folder = folder
        events_writer = import_tensorboardx().event_file_writer.EventsWriter
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # a resumed run may begin within the second in which the one before it ended, and has another file
            self._writer: Any = events_writer(os.fspath(folder / "events"), f".{uuid.uuid4().hex[:8]}")
        except OSError as err:
            raise self._error(err) from err

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds figures at a step, on the disk when this returns. Raises: StorageError."""
        package = import_tensorboardx()
        event = package.proto.event_pb2.Event(wall_time=time.time(), step=step)
        for tag, value in figures.items():
            event.summary.value.add(tag=tag, simple_value=value)
        try:
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as err:
            raise self._error(err) from err

    def attach(self, page: Path) -> None:
        """Nothing: TensorBoard shows no pages."""

    def close(self, *, failed: bool) -> None:
        """Ends the file; that of a run that failed is as whole as it is."""
        self._writer.close()

    def _error(self, err: OSError) -> StorageError:
        return StorageError(f"{self._folder}: cannot write TensorBoard's events: {err.strerror or err}")


def import_tensorboardx() -> Any:
    """The package. Raises: ConfigError where it is not installed."""
    try:
        import tensorboardX
        import tensorboardX.event_file_writer
        import tensorboardX.proto.event_pb2
    except ImportError:
        raise ConfigError("--tensorboard needs one more package: pip install 'probe-jax[tensorboard]'") from None
    return tensorboardX
