"""Whether an unpenalised head has an optimum: it has none where weights may grow for ever and lose ever less."""

import numpy as np
from scipy.sparse.csgraph import connected_components

from probe.errors import NumericalError
from probe.probing.features import Features, gathered, pieces

_AT_ONCE = 512  # rows
_CLOSE = 7.0  # nats: a class further behind on every row of another is what growing weights would leave there


def check_not_separated(features: Features, labels: np.ndarray, used: np.ndarray, weights: np.ndarray) -> None:
    """Raises NumericalError if larger heads than these would lose less: they answer every row rightly, or a part of
    them parts one class, or a group of classes, from all others, even where the classes of a group overlap.

    Args:
      labels: [N] of a softmax, or [N, K] of 0 and 1 for K sigmoids. used: [N] bool. weights: [K, M, D + 1].
    """
    if weights.shape[1] == 1:
        separated = _all_right(features, labels, used, weights[:, 0]).any()
    else:
        ahead = _ahead(features, labels, used, weights[0])
        _, component = connected_components(ahead > -_CLOSE, directed=False)
        groups = [np.arange(len(ahead)) == label for label in range(len(ahead))]
        groups += [component == one for one in range(component.max() + 1) if 1 < (component == one).sum() < len(ahead)]
        right = np.all(ahead[~np.eye(len(ahead), dtype=bool)] < 0)
        separated = right or _is_parted(features, labels, used, weights[0], np.array(groups)).any()
    if separated:
        raise NumericalError(
            "the classes can be separated, or some of them from the rest, so at λ = 0 the weights grow for ever and "
            "there is no optimum. Give a λ above 0."
        )


def _all_right(features: Features, labels: np.ndarray, used: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """[K] whether each sigmoid's head, [K, D + 1], answers every row rightly."""
    right = np.ones(len(heads), bool)
    for at, part in pieces(features, _AT_ONCE):
        logits = part[used[at]].astype(np.float32) @ heads[:, :-1].T + heads[:, -1]
        right &= np.all(((logits > 0) == labels[at[used[at]]]) & (logits != 0), axis=0)
    return np.asarray(np.all(gathered(features, right), axis=0))


def _ahead(features: Features, labels: np.ndarray, used: np.ndarray, head: np.ndarray) -> np.ndarray:
    """[C, C]: on rows of the first class, by how much the second's logit is above the first's at most."""
    ahead = np.full((len(head), len(head)), -np.inf)
    for at, part in pieces(features, _AT_ONCE):
        own = labels[at[used[at]]]
        logits = part[used[at]].astype(np.float32) @ head[:, :-1].T + head[:, -1]
        np.maximum.at(ahead, own, logits - np.take_along_axis(logits, own[:, None], axis=1))
    return np.asarray(np.max(gathered(features, ahead), axis=0))


def _is_parted(
    features: Features, labels: np.ndarray, used: np.ndarray, head: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """[G] whether the group's mean logit less that of the others is higher on all of its rows than on any other row.

    Args:
      groups: [G, C] bool.
    """
    contrast = groups / groups.sum(axis=1, keepdims=True) - ~groups / (~groups).sum(axis=1, keepdims=True)
    directions = contrast @ head
    least, highest = np.full(len(groups), np.inf), np.full(len(groups), -np.inf)
    for at, part in pieces(features, _AT_ONCE):
        scores = part[used[at]].astype(np.float32) @ directions[:, :-1].T + directions[:, -1]
        inside = groups[:, labels[at[used[at]]]].T
        least = np.minimum(least, np.where(inside, scores, np.inf).min(axis=0, initial=np.inf))
        highest = np.maximum(highest, np.where(inside, -np.inf, scores).max(axis=0, initial=-np.inf))
    found = gathered(features, (least, highest))
    return np.asarray(np.min([low for low, _ in found], axis=0) > np.max([high for _, high in found], axis=0))
