"""Where fine-tuning starts: the head that the embeddings of the training rows alone determine.

Starting from a solved head keeps the first steps from tearing at the backbone (Kumar et al. 2022,
arXiv:2202.10054, LP-FT). λ is chosen by cross-validation within the training rows, so that no validation row
has a part in the head, and the validation rows may judge it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from probe import distributed
from probe.backbones import Backbone, Precision, make_embed_fn
from probe.cache import Cache
from probe.errors import MismatchError
from probe.heads import TrainedHead, num_logits
from probe.probing.scaling import Scaling
from probe.probing.solver import Problem
from probe.progress import Progress
from probe.splits import assign_folds
from probe.training.decoded import ImageRows

VIEW = "pooler"
_PENALTIES = tuple(float(penalty) for penalty in np.logspace(2, -6, 17))  # λ, for standardised features
_NUM_FOLDS = 5


def zero_head(width: int, num_classes: int) -> TrainedHead:
    """A linear head that guesses uniformly."""
    outputs = num_logits(num_classes)
    kernel, bias = np.zeros((width, outputs), np.float32), np.zeros(outputs, np.float32)
    return TrainedHead(hidden=(), params={"kernel": kernel, "bias": bias})


def text_head(backbone: Backbone, zero_shot: TrainedHead, embeddings: np.ndarray) -> TrainedHead:
    """A linear head on the embeddings that decides as the zero-shot head does on the projected view.

    That head divides an image's projection by its norm, which no linear head can; this one divides by the mean norm of
    the given embeddings, [N, D]. It changes no decision.
    """
    projection = np.asarray(backbone.variables["params"]["visual_projection"]["kernel"], np.float64)
    norm = float(np.linalg.norm(embeddings @ projection, axis=1).mean())
    kernel = projection @ zero_shot.params["kernel"] / norm
    return TrainedHead(hidden=(), params={"kernel": kernel.astype(np.float32), "bias": zero_shot.params["bias"]})


def solve_head(
    embeddings: np.ndarray, labels: np.ndarray, groups: np.ndarray, num_classes: int, *, seed: int
) -> tuple[TrainedHead, dict[str, Any]]:
    """The linear head at the optimum of the penalised cross-entropy, λ by cross-validated loss.

    Args:
      embeddings: [N, D] float32; labels: [N] integers; groups: [N] of text. Of the training rows alone.
      seed: of the folds.
    Returns: the head on raw embeddings, and λ and the solver's certificate as JSON values.
    """
    scaling = Scaling.of(embeddings, "standard")
    features = scaling.apply(embeddings)
    folds, _ = assign_folds(labels, groups, _NUM_FOLDS, seed=seed)
    problem = Problem(features, labels, num_classes, folds=folds, standardise_folds=True)
    left_out = sorted(set(folds.tolist()) - {-1})
    if left_out:
        path = problem.path(_PENALTIES, left_out)
        penalty = _PENALTIES[int(np.argmin(path.nll @ path.count))]
    else:  # each class has one row: nothing can be left out
        penalty = 1.0
    solution = problem.fit(penalty)
    head = TrainedHead(hidden=(), params=scaling.fold(solution.params))
    return head, {"penalty": penalty, "num_folds": len(left_out), "solution": solution.certificate()}


def embed_rows(
    backbone: Backbone, images: ImageRows, rows: np.ndarray, *, batch_size: int, cache: Path | None
) -> np.ndarray:
    """Embeddings [n, D] float32 of the given rows; each process computes a part of them.

    Args:
      cache: folder made by `probe embed`; what it holds, by the hash of the image, is not computed again, and what it
        lacks is computed in its precision.
    Raises: MismatchError if the cache was made with another backbone; what opening a cache raises.
    """
    embeddings = np.empty((len(rows), backbone.width), np.float32)
    known = {} if cache is None else _known(cache, backbone)
    found = np.array([known.get(images.keys[row].tobytes(), -1) for row in rows])
    if cache is not None and (found >= 0).any():
        embeddings[found >= 0] = Cache.open(cache).embeddings(VIEW, found[found >= 0])
    (missing,) = np.nonzero(found < 0)
    precision = None if cache is None else Precision.from_json(Cache.open(cache).provenance.get("precision"))
    embed_fn = make_embed_fn(backbone, (VIEW,), precision)
    own = rows[missing[distributed.share(len(missing))]]

    def embed_own() -> np.ndarray:
        computed = [np.empty((0, backbone.width), np.float32)]
        with Progress("embedding", total=len(own), unit="images") as progress:
            for batch in images.batches(own, batch_size):
                num = int(batch.mask.sum())
                outputs: Mapping[str, Any] = embed_fn(batch.inputs)
                computed.append(np.asarray(outputs[VIEW])[:num])
                progress.advance(num)
        return np.concatenate(computed)

    embeddings[missing] = np.concatenate(distributed.on_each(embed_own))
    return embeddings


def _known(folder: Path, backbone: Backbone) -> dict[bytes, int]:
    """Row of the cache by content key."""
    cache = Cache.open(folder)
    theirs = cache.provenance["backbone_fingerprint"]
    if theirs != backbone.fingerprint:
        raise MismatchError(
            f"--cache {folder}: made with backbone {cache.provenance['backbone']!r} ({theirs[:12]}), but this run "
            f"uses {backbone.name!r} ({backbone.fingerprint[:12]}). Leave --cache out, or embed with this backbone."
        )
    return {key.tobytes(): row for row, key in enumerate(np.ascontiguousarray(cache.table.keys))}
