"""Which of the rows that judge a run its page knows: those of the galleries, and as many others as fit."""

import numpy as np

from probe.reporting.answers import Answers
from probe.reporting.rendering import json_block
from probe.sources import display_name

_NUM_MISTAKES, _NUM_HITS = 24, 12
_MAX_ROWS = 10_000  # points of the map, images of the confusion matrix
_MAX_BYTES = 3_000_000  # what these may take, where names are long or labels are sets


def galleries(answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    """The surest mistakes and the least certain hits, as indices of rows."""
    return answers.mistakes(_NUM_MISTAKES), answers.doubtful_hits(_NUM_HITS)


def shown_rows(answers: Answers) -> np.ndarray:
    """Ascending indices: all rows, or as many as fit of an even draw that has those of the galleries."""
    order = np.random.default_rng(0).permutation(len(answers))
    always = np.unique(np.concatenate(galleries(answers)))
    order = np.concatenate([always, order[~np.isin(order, always)]])[:_MAX_ROWS]
    num_fitting = np.searchsorted(np.cumsum([_num_bytes(answers, row) for row in order]), _MAX_BYTES)
    return np.sort(order[: max(len(always), int(num_fitting))])


def _num_bytes(answers: Answers, row: int) -> int:
    """At most what a row takes as JSON: its name, its numbers, and where labels are sets perhaps two of its own."""
    texts = [display_name(answers.of.names[row])]
    if answers.of.multi_label:
        texts += [answers.texts[answers.label[row]], answers.texts[answers.predicted[row]]]
    return sum(len(json_block(text).encode(errors="replace")) for text in texts) + 40
