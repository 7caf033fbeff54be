"""What every head of `fit-linear` is given and gives back."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from probe.config import FitLinearConfig
from probe.errors import ConfigError, InputError
from probe.heads import TrainedHead
from probe.probing.features import Features
from probe.splits import Splits, group_numbers

Report = Callable[[str, int, int | None, str], None]  # what is done, how many, of how many (None: unknown), of what


def silent(what: str, num_done: int, num: int | None, unit: str) -> None:
    """A report that nobody hears."""


@dataclasses.dataclass(frozen=True)
class Data:
    """embeddings: view name to [N, D] float32, in memory or streamed; labels: [N] integers or [N, C] bool; folds: [N]
    which fold leaves a training row out, -1 for one that is never left out; class_names: of the C classes;
    text_weights: [P, M], the zero-shot head's on rows of norm 1 of the projected view, where --prior text asks; groups:
    [N] of text, of rows that are left out together, "" for none."""

    embeddings: Mapping[str, Features]
    labels: np.ndarray
    splits: Splits
    folds: np.ndarray
    class_names: tuple[str, ...]
    text_weights: np.ndarray | None = None
    groups: np.ndarray | None = None

    def in_memory(self, view: str) -> np.ndarray:
        """The embeddings of a view, for what cannot stream them."""
        embeddings = self.embeddings[view]
        assert isinstance(embeddings, np.ndarray), "fit_linear streams only for heads that can"
        return embeddings

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def multi_label(self) -> bool:
        return self.labels.ndim == 2

    @property
    def curve_accuracy(self) -> str:
        """What curves call the share of right answers: of labels, where a row has several."""
        return "label_accuracy" if self.multi_label else "accuracy"


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained head and how it came about.

    head: acts on raw embeddings of `view`. val_rows, val_logits: rows that may be judged, and what heads that neither
    were fitted on them nor chosen by them say of them, [n, C]; `val_of` says in words which heads, `val_is_calibrated`
    whether these logits are divided by a temperature, which must be of other rows then.
    out_of_fold: [N train, C], what heads say of training rows that they were not fitted on, before any temperature;
    NaN where there is none. test_logits: [N test, C], what the saved head says of the test rows, once it was asked.
    facts: what metrics.json says of the fit, JSON values; "temperature" is that of the head. warnings: what a person
    should know.
    """

    head: TrainedHead
    view: str
    val_rows: np.ndarray
    val_logits: np.ndarray | None
    val_of: str
    facts: dict[str, Any]
    val_is_calibrated: bool = False
    out_of_fold: np.ndarray | None = None
    test_logits: np.ndarray | None = None
    warnings: tuple[str, ...] = ()


def train_groups(data: Data) -> np.ndarray:
    """[N train] integers: rows of one group, which are left out together; without groups each row is one.

    Raises: InputError if all rows are one group.
    """
    train = data.splits.train
    numbers = np.arange(len(train)) if data.groups is None else group_numbers(data.groups[train])
    if len(set(numbers.tolist())) < 2:
        raise InputError(
            f"all {len(train)} training rows are one group, so that none can be judged by the others. Give them groups "
            "that are left out one by one, or use --solver lbfgs, which a val split suffices."
        )
    return numbers


def row_weights(config: FitLinearConfig, data: Data, rows: np.ndarray) -> np.ndarray:
    """[n] how much each row counts, by its class: as often as others where balanced, or as said.

    Raises: ConfigError for a weight of a class that there is not.
    """
    if not config.class_weights:
        return np.ones(len(rows))
    by_class = np.ones(data.num_classes)
    if config.class_weights == ("balanced",):
        by_class = len(data.splits.train) / (
            data.num_classes * np.bincount(data.labels[data.splits.train], minlength=data.num_classes)
        )
    else:
        for item in config.class_weights:
            name, _, weight = item.rpartition("=")
            if name not in data.class_names:
                known = ", ".join(map(repr, data.class_names))
                raise ConfigError(f"--class-weights {item}: no class {name!r}; there are {known}")
            by_class[data.class_names.index(name)] = float(weight)
    return np.asarray(by_class[data.labels[rows]])
