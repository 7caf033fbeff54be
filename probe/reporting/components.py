"""The embeddings behind a run's map, where no cache has them: a file of the run folder, `map.safetensors`.

    keys        uint8 [n, 32]      SHA-256 of the bytes of the images that the report knows
    components  float32 [n, K]     their embeddings along their K principal axes, centred
    metadata    format version and the variance of the whole embeddings, as JSON under "probe"

K is 50 or less, so that 10,000 images take 2.3 MB: the map of two components is that of the whole embeddings, and what
UMAP makes of 50 is what it makes of all, but for noise.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from sklearn.decomposition import PCA

from probe.evaluation import tensor_file
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
    header = {"variance": float(embeddings.var(axis=0, ddof=1).sum())}
    return tensor_file.to_bytes(_FORMAT_VERSION, header, {"keys": keys, "components": values.astype(np.float32)})


def load(run: Path) -> Components | None:
    """What a run folder holds, None if nothing. The run's manifest, which `bundle.load` checks, vouches for the bytes.

    Raises: CorruptError if the file is damaged or of an unknown format version.
    """
    path = run / FILE_NAME
    if not path.is_file():
        return None
    return tensor_file.load(
        path,
        _FORMAT_VERSION,
        lambda header, tensors: Components(tensors["keys"], tensors["components"], header["variance"]),
    )
