"""What TensorBoard shows of a training: an event file with the figures of each epoch, as it ends.

Written by tensorboardX, the extra `tensorboard`: 0.7 MB that needs neither TensorFlow nor PyTorch. Its file writer is
called directly, since its SummaryWriter writes in a thread, which a full disk would end without a word.
"""

import os
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from probe.errors import ConfigError, StorageError
from probe.training.train import Epoch

_TAGS = {
    "loss/train": "train_loss",
    "loss/validation": "val_loss",
    "accuracy/train": "train_accuracy",
    "accuracy/validation": "val_accuracy",
    "seconds": "seconds",
}


class EventFile:
    """A new event file in a folder; with `folder` None, nothing.

    with EventFile(folder) as events:
        events.write(epoch)
    """

    def __init__(self, folder: Path | None) -> None:
        """Raises: ConfigError where tensorboardX is not installed; StorageError."""
        self._folder = folder
        self._writer: Any = None
        if folder is None:
            return
        events_writer = import_tensorboardx().event_file_writer.EventsWriter
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # a resumed run may begin within the second in which the one before it ended, and has another file
            self._writer = events_writer(os.fspath(folder / "events"), f".{uuid.uuid4().hex[:8]}")
        except OSError as err:
            raise self._error(err) from err

    def write(self, line: Epoch) -> None:
        """Adds the figures of an epoch at its last step, on the disk when this returns. Raises: StorageError."""
        if self._writer is None:
            return
        package = import_tensorboardx()
        event = package.proto.event_pb2.Event(wall_time=time.time(), step=line.step)
        for tag, field in _TAGS.items():
            event.summary.value.add(tag=tag, simple_value=getattr(line, field))
        try:
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as err:
            raise self._error(err) from err

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
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
