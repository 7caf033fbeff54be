"""What a run answered to each example: one file of the run folder, `predictions.safetensors`.

    names, name_ends   uint8 [bytes], int64 [N]   the examples' names, one after the other, and where each ends
    keys               uint8 [N, 32]              SHA-256 of each file's bytes
    splits             uint8 [N]                  0 train, 1 val, 2 test
    labels             int32 [N], or uint8 [N, C] if a row may have several
    logits             float32 [N, C]             of the softmax (two columns for two classes), or of the sigmoids
    metadata           format version and class names, as JSON under "probe"

No row is answered by a head that was fitted on it: those of train are out of fold, or absent. All logits are
calibrated as the saved head's are, divided by its temperature where it has one, so that splits and runs compare. That
number is itself fitted on the out-of-fold answers to train (on validation, of an MLP): there, their likelihood and
calibration error flatter by one parameter, while which class is answered is untouched.
Whoever compares runs joins rows by content key and label, never by position.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probe.errors import InputError
from probe.evaluation import tensor_file

FILE_NAME = "predictions.safetensors"
FORMAT_VERSION = 1
_SPLITS = np.array(["train", "val", "test"])


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Answers to N examples.

    class_names: of the C classes. names: N, opaque bytes. keys: [N, 32] uint8. splits: [N] of "train", "val", "test".
    labels: [N] int32, or [N, C] bool. logits: [N, C] float32.
    """

    class_names: tuple[str, ...]
    names: list[bytes]
    keys: np.ndarray
    splits: np.ndarray
    labels: np.ndarray
    logits: np.ndarray

    def __post_init__(self) -> None:
        shape = (len(self.names), len(self.class_names))
        assert self.logits.shape == shape, self.logits.shape
        assert self.labels.shape in (shape, shape[:1]), self.labels.shape
        assert self.keys.shape == (shape[0], 32), self.keys.shape
        assert self.splits.shape == shape[:1], self.splits.shape

    @property
    def multi_label(self) -> bool:
        return self.labels.ndim == 2

    def take(self, rows: np.ndarray) -> "Predictions":
        """The rows with these indices, or where the mask is true."""
        indices = np.arange(len(self.names))[rows]
        return dataclasses.replace(
            self,
            names=[self.names[i] for i in indices],
            keys=self.keys[indices],
            splits=self.splits[indices],
            labels=self.labels[indices],
            logits=self.logits[indices],
        )


def collect(
    answers: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    class_names: Sequence[str],
    names: Sequence[bytes],
    keys: np.ndarray,
    labels: np.ndarray,
) -> Predictions:
    """Puts together what was answered to each split.

    Args:
      answers: split to (indices [n] of its rows, logits [n, C]).
      class_names, names, keys, labels: of all rows, as `Predictions` has them; keys [N, 32] uint8.
    """
    # What comes first is for a run that has nothing to show
    rows = np.concatenate([np.empty(0, np.int64), *(rows for rows, _ in answers.values())])
    logits = [np.empty((0, len(class_names)), np.float32), *(logits for _, logits in answers.values())]
    return Predictions(
        class_names=tuple(class_names),
        names=[names[int(row)] for row in rows],
        keys=keys[rows],
        splits=np.repeat(np.array(list(answers), str), [len(rows) for rows, _ in answers.values()]),
        labels=labels[rows],
        logits=np.concatenate(logits),
    )


def to_bytes(predictions: Predictions) -> bytes:
    """The file's content; the same predictions give the same bytes."""
    codes = (predictions.splits[:, None] == _SPLITS).argmax(axis=1)
    assert (_SPLITS[codes] == predictions.splits).all(), "a split that has no code"
    tensors = {
        "names": np.frombuffer(b"".join(predictions.names), np.uint8),
        "name_ends": np.cumsum([len(name) for name in predictions.names], dtype=np.int64),
        "keys": predictions.keys.astype(np.uint8),
        "splits": codes.astype(np.uint8),
        "labels": predictions.labels.astype(np.uint8 if predictions.multi_label else np.int32),
        "logits": np.asarray(predictions.logits, np.float32),
    }
    return tensor_file.to_bytes(FORMAT_VERSION, {"class_names": predictions.class_names}, tensors)


def load(run: Path) -> Predictions:
    """Reads a run's predictions back. The run's manifest, which `bundle.load` checks, vouches for the bytes.

    Raises: InputError if the run has none; CorruptError if the file is damaged or of an unknown format version.
    """
    path = run / FILE_NAME
    if not path.is_file():
        raise InputError(f"{run}: it has no {FILE_NAME}, so what it answered is not known. Train it again.")
    return tensor_file.load(path, FORMAT_VERSION, _from_tensors)


def _from_tensors(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> Predictions:
    blob, ends = tensors["names"].tobytes(), tensors["name_ends"].tolist()
    labels = tensors["labels"]
    return Predictions(
        class_names=tuple(header["class_names"]),
        names=[blob[start:end] for start, end in zip([0, *ends], ends, strict=False)],
        keys=tensors["keys"],
        splits=_SPLITS[tensors["splits"]],
        labels=labels.astype(bool) if labels.ndim == 2 else labels,
        logits=tensors["logits"],
    )
