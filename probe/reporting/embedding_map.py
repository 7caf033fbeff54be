"""A map of embeddings: the plane in which they differ most (PCA), or one that keeps neighbours together (UMAP)."""

import dataclasses
from typing import Literal

import numpy as np
from sklearn.decomposition import PCA

from probe.errors import ConfigError

Method = Literal["pca", "umap"]
STEPS = 4095  # positions are whole numbers from 0 to this


@dataclasses.dataclass(frozen=True, eq=False)
class Map:
    """positions: [n, 2] integers from 0 to STEPS, the longer side filling the range. note: what the axes are."""

    positions: np.ndarray
    note: str


def make_map(embeddings: np.ndarray, method: Method = "pca", variance: float | None = None) -> Map:
    """Lays rows out in the plane.

    Args:
      embeddings: [n, D] float32, n of at least 3; or what is left of them along fewer axes, and then
      variance: theirs, summed over the axes.
    Raises: ConfigError if UMAP is asked for and not installed.
    """
    if method == "umap":
        try:
            import umap
        except ImportError:
            raise ConfigError("--map umap needs one more package: pip install 'probe-jax[umap]'") from None
        plane = umap.UMAP(random_state=0, n_jobs=1).fit_transform(embeddings)
        return Map(_fit(plane), "UMAP: neighbours lie together; distances between groups mean little")
    pca = PCA(2, svd_solver="randomized", random_state=0)
    if variance is None:
        variance = float(embeddings.var(axis=0, ddof=1).sum())
    with np.errstate(invalid="ignore"):  # where all are the same
        plane = pca.fit_transform(embeddings)
    first, second = (f"{100 * share / (variance or 1.0):.0f} %" for share in pca.explained_variance_)
    return Map(_fit(plane), f"the two principal components, {first} and {second} of the variance")


def _fit(plane: np.ndarray) -> np.ndarray:
    low, high = plane.min(axis=0), plane.max(axis=0)
    side = float((high - low).max()) or 1.0
    centred = (plane - (low + high) / 2) / side + 0.5
    return np.asarray(np.round(centred * STEPS).astype(int))
