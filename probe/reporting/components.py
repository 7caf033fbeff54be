"""The embeddings behind a run's map, where no cache has them: a file of the run folder, `map.safetensors`.

    keys        uint8 [n, 32]      SHA-256 of the bytes of the images that the report knows
    components  float32 [n, K]     their embeddings along their K principal axes, centred
    metadata    format version and the variance of the whole embeddings, as JSON under "probe"

K is 50 or less, so that 10,000 images take 2.3 MB: the map of two components is that of the whole embeddings, and what
UMAP makes of 50 is what it makes of all, but for noise.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open
from sklearn.decomposition import PCA

from probe.errors import CorruptError
from probe.evaluation.predictions import Predictions
from probe.reporting.answers import Answers
from probe.reporting.shown import shown_rows

FILE_NAME = "map.safetensors"
_FORMAT_VERSION = 1
_NUM_COMPONENTS = 50


@dataclasses.dataclass(frozen=True, eq=False)
class Components:
    """keys: [n, 32] uint8. values: [n, K] float32. variance: of the whole embeddings, summed over their axes."""

    keys: np.ndarray
    values: np.ndarray
    variance: float

    def rows(self, keys: Sequence[bytes]) -> np.ndarray | None:
        """Where images stand, by content key; None if one of them is not here."""
        row_of = {key.tobytes(): row for row, key in enumerate(self.keys)}
        return np.array([row_of[key] for key in keys]) if row_of.keys() >= set(keys) else None


def of_answers(answers: Predictions, embeddings_of: Callable[[str], np.ndarray]) -> dict[str, bytes]:
    """The file for a run folder, by its name; nothing where a map would have less than three points.

    Args:
      answers: all that the run holds. embeddings_of: a split's name -> [N, D] embeddings of its rows among these.
    """
    judged = Answers.of_run(answers)
    if judged is None or len(judged) < 3:
        return {}
    shown = shown_rows(judged)
    return {FILE_NAME: to_bytes(judged.of.keys[shown], embeddings_of(judged.split)[shown])}


def to_bytes(keys: np.ndarray, embeddings: np.ndarray) -> bytes:
    """The file's content. Args: keys [n, 32] uint8; embeddings [n, D], n of at least 3."""
    with np.errstate(invalid="ignore"):  # where all are the same
        values = PCA(min(_NUM_COMPONENTS, *embeddings.shape), random_state=0).fit_transform(embeddings)
    header = {"format_version": _FORMAT_VERSION, "variance": float(embeddings.var(axis=0, ddof=1).sum())}
    tensors = {"keys": np.ascontiguousarray(keys), "components": np.ascontiguousarray(values, np.float32)}
    return bytes(safetensors.numpy.save(tensors, metadata={"probe": json.dumps(header)}))


def load(run: Path) -> Components | None:
    """What a run folder holds, None if nothing. The run's manifest, which `bundle.load` checks, vouches for the bytes.

    Raises: CorruptError if the file is damaged or of an unknown format version.
    """
    path = run / FILE_NAME
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads(file.metadata()["probe"])
            found = Components(file.get_tensor("keys"), file.get_tensor("components"), header["variance"])
    except (SafetensorError, ValueError, TypeError, KeyError) as err:
        raise CorruptError(f"{path}: damaged: {err}. Restore it from a copy, or train again.") from err
    if header["format_version"] != _FORMAT_VERSION:
        raise CorruptError(
            f"{path}: format version {header['format_version']}, but this program reads {_FORMAT_VERSION}. "
            "Use the version of probe that config.json names, or train again."
        )
    return found
