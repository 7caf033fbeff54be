"""The training images nearest to an image, from the embeddings in the run's cache.

Nearness is the cosine of embeddings from which the mean of the training images is taken: 1 is the same, 0 is no more
like it than any. (On 200 test photos of cats and dogs, ResNet-50, the six nearest are of the right class in 94.9 %,
95.8 % without taking the mean, where any two photos have a cosine of 0.65 and the figure says nothing.)
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from probe import provenance
from probe.bundle import Bundle
from probe.cache import Cache
from probe.errors import CorruptError, InputError, MismatchError

MAX_ROWS = 200_000  # that are compared with an image: 0.6 GB of embeddings 768 wide


@dataclasses.dataclass(frozen=True)
class TrainingImage:
    """What is known of one."""

    name: bytes
    """Path below the folder of images, or member name."""
    key: bytes
    """SHA-256 of its bytes."""
    labels: tuple[str, ...]


class Neighbours:
    """Training images, and a compiled search among them."""

    def __init__(self, embeddings: np.ndarray, images: list[TrainingImage], num: int) -> None:
        """
        Args:
          embeddings: [N, D] float32 of the images. num: K, how many are found, at most N.
        """
        self.images = images
        self._mean = embeddings.mean(axis=0, dtype=np.float64).astype(np.float32)
        bank = embeddings - self._mean
        norms = np.linalg.norm(bank, axis=1, keepdims=True)
        bank /= np.where(norms > 0, norms, 1)
        self._bank = jnp.asarray(bank)
        self._search = jax.jit(functools.partial(_nearest, num=min(num, len(images))))

    def search(self, embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[B, D] -> indices into `images` and cosines [B, K], the nearest first; give one B always, each compiles."""
        rows, cosines = self._search(self._bank, self._mean, embeddings)
        return np.asarray(rows), np.asarray(cosines)


def _nearest(bank: jax.Array, mean: jax.Array, embeddings: jax.Array, *, num: int) -> tuple[jax.Array, jax.Array]:
    queries = embeddings - mean
    norms = jnp.linalg.norm(queries, axis=1, keepdims=True)
    queries = queries / jnp.where(norms > 0, norms, 1)
    cosines, rows = jax.lax.top_k(jnp.matmul(queries, bank.T, precision="highest"), num)
    return rows, jnp.clip(cosines, -1, 1)


def open_neighbours(
    classifier: Bundle, cache: Path | None, num: int
) -> tuple[Neighbours | None, dict[str, Any] | None, str | None]:
    """The images that fitted a classifier, where their embeddings are to be had.

    Args:
      cache: where it is now; None: where the run found it.
    Returns: the neighbours, or None; where the images are, as `sources.describe_origin` has it; and what is missing, in
      words.
    Raises: what opening a cache does, and MismatchError if it is of another backbone, for a cache that was asked for.
    """
    made = provenance.load(classifier.folder)
    recorded = made.get("cache")
    root = cache or (Path(recorded["path"]) if recorded else None)
    if root is None:
        return None, None, "The nearest training images are not known: this run was made without a cache."
    try:
        opened = Cache.open(root)
        neighbours, note = _of_cache(classifier, opened, num)
    except (InputError, MismatchError, CorruptError) as err:
        if cache is not None:
            raise
        return None, None, f"The nearest training images are not known: {err}"
    return neighbours, made.get("source") or opened.origin, note


def _of_cache(classifier: Bundle, cache: Cache, num: int) -> tuple[Neighbours, str | None]:
    theirs = cache.provenance["backbone_fingerprint"]
    if theirs != classifier.backbone.fingerprint:
        backbone = classifier.folder / "backbone" if classifier.finetuned else classifier.backbone.name
        raise MismatchError(
            f"{cache.root} holds embeddings of another backbone"
            + (" than the fine-tuned one. " if classifier.finetuned else ". ")
            + f"Make one with `probe embed IMAGES --backbone {backbone} --out CACHE`, and give it with --cache."
        )
    table = cache.table
    rows = np.array([row for row, key in enumerate(table.keys) if bytes(key) in classifier.seen], np.int64)
    if not len(rows):
        raise MismatchError(f"{cache.root}: it holds none of the images that this classifier was trained on")
    note = None
    if len(rows) > MAX_ROWS:
        note = f"The nearest training images are those of {MAX_ROWS:,}, drawn evenly from {len(rows):,}."
        rows = rows[np.linspace(0, len(rows) - 1, MAX_ROWS).astype(np.int64)]
    images = [
        TrainingImage(table.names[row], bytes(table.keys[row]), _labels(cache, table.labels[row])) for row in rows
    ]
    return Neighbours(cache.embeddings(classifier.view, rows), images, num), note


def _labels(cache: Cache, label: Any) -> tuple[str, ...]:
    if cache.multi_label:
        return tuple(name for name, is_one in zip(cache.class_names, label, strict=True) if is_one)
    return () if label < 0 else (cache.class_names[label],)
