"""`probe compare`: which of two runs is better, on the same rows, and whether that is more than chance."""

import collections
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from probe import bundle
from probe.config import CompareConfig
from probe.errors import InputError, MismatchError
from probe.evaluation import predictions
from probe.evaluation.figures import LOSSES
from probe.evaluation.paired import compare_answers
from probe.evaluation.predictions import Predictions
from probe.notebook import figure, looks, table
from probe.sources import display_name, list_names

_CHANGES = ("fixed", "broken", "other")
_LEVEL = 0.05  # of a corrected p-value, below which a class is said to differ
_LISTED = 10  # flipped images and classes that are printed; --json has all


def _look(result: dict[str, Any]) -> str:
    """The comparison in a notebook."""
    rows = [
        (name.replace("_", " "), figure(line["a"]), figure(line["b"]), figure(line["difference"], line["interval_95"]))
        for name, line in result["figures"].items()
    ]
    caption = f"A = {result['run_a']}, B = {result['run_b']}: {result['n']:,} {result['split']} rows"
    note = f"exact McNemar p = {result['mcnemar']['p_value']:.3g}; {len(result['flips']):,} answers differ"
    return table(caption, ("figure", "A", "B", "B - A (95 %)"), rows, note=note)


@looks(_look)
def compare(config: CompareConfig) -> dict[str, Any]:
    """Compares what two runs answered to the rows of one split.

    Returns: run_a, run_b, split; all that `paired.compare_answers` says; flips: every row on which they differ, as
      {"path", "label", "a", "b", "change"}: fixed (only B is right), broken (only A is right) or other. Labels are
      class names, or lists of them where a row may have several.
    Raises: InputError if a folder is no run or has no answers to this split; MismatchError if the runs know other
      classes or answered other rows; CorruptError as `bundle.load` does.
    """
    a, b = (_answers(run, config.split) for run in (config.run_a, config.run_b))
    b = align(a, b)
    compared = compare_answers(a.logits, b.logits, a.labels, a.class_names, seed=config.seed)
    runs = {"run_a": str(config.run_a), "run_b": str(config.run_b), "split": config.split}
    return {**runs, **compared, "flips": _flips(a, b)}


def describe(result: dict[str, Any]) -> str:
    """The comparison as lines for people."""
    lines = [
        f"A = {result['run_a']}, B = {result['run_b']}: {result['n']:,} {result['split']} rows. "
        "Differences are B - A, with 95 % intervals of the paired bootstrap (accuracy: Bonett and Price)."
    ]
    for name, line in result["figures"].items():
        if line["difference"] is not None:
            low, high = line["interval_95"]
            lines.append(
                f"{name:27} {line['a']:.4f} to {line['b']:.4f}  {line['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
                f"  {_verdict(name, low, high)}"
            )
    test = result["mcnemar"]
    lines.append(
        f"only A is right: {test['only_a_correct']:,}, only B is right: {test['only_b_correct']:,}; "
        f"exact McNemar p = {test['p_value']:.3g}"
    )
    lines += _describe_classes(result["per_class"])
    flips = result["flips"]
    count = collections.Counter(flip["change"] for flip in flips)
    lines.append(f"{len(flips):,} answers differ: " + ", ".join(f"{count[change]:,} {change}" for change in _CHANGES))
    for flip in flips[:_LISTED]:
        label, before, after = (_shown(flip[key]) for key in ("label", "a", "b"))
        lines.append(f"  {flip['change']:6} {flip['path']}: is {label}, A says {before}, B says {after}")
    if len(flips) > _LISTED:
        lines.append(f"  and {len(flips) - _LISTED:,} more, which --json lists")
    return "\n".join(lines)


def align(a: Predictions, b: Predictions) -> Predictions:
    """B's rows and classes in A's order. Rows are the same if content and label are; names and places may differ.

    Raises: MismatchError, naming what differs, unless both have the same classes and the same rows.
    """
    if a.multi_label != b.multi_label:
        kinds = ["a set of labels" if one.multi_label else "one label" for one in (a, b)]
        raise MismatchError(f"A gives a row {kinds[0]}, B {kinds[1]}: such answers cannot be compared.")
    if set(a.class_names) != set(b.class_names):
        only_a, only_b = (sorted(set(x.class_names) - set(y.class_names)) for x, y in ((a, b), (b, a)))
        raise MismatchError(
            f"the runs know other classes: only A has {list_names(only_a) or 'none'}; only B has "
            f"{list_names(only_b) or 'none'}. Compare runs that were trained on the same classes."
        )
    columns = [b.class_names.index(name) for name in a.class_names]
    labels = b.labels[:, columns] if b.multi_label else np.argsort(columns).astype(b.labels.dtype)[b.labels]
    b = dataclasses.replace(b, class_names=a.class_names, labels=labels, logits=b.logits[:, columns])

    if collections.Counter(_identities(a)) != collections.Counter(_identities(b)):
        raise MismatchError(_how_rows_differ(a, b))
    row_of_b = np.empty(len(a.names), np.int64)
    row_of_b[_order(a)] = _order(b)
    return b.take(row_of_b)


def _answers(run: Path, split: str) -> Predictions:
    bundle.load(run)  # proves that no file of the run is damaged
    answers = predictions.load(run)
    chosen = answers.take(answers.splits == split)
    if not chosen.names:
        there = ", ".join(sorted(set(answers.splits.tolist()))) or "no split"
        raise InputError(f"{run}: it holds no answers to {split} rows, but to {there}: give one of these to --split")
    return chosen


def _identities(of: Predictions) -> list[bytes]:
    """What makes a row the same in another run: the bytes of its image, and its label."""
    return [key.tobytes() + label.tobytes() for key, label in zip(of.keys, of.labels, strict=True)]


def _order(of: Predictions) -> list[int]:
    """Indices that put rows in an order of their own; rows that are equal in content and label go by name."""
    keys = list(zip(_identities(of), of.names, strict=True))
    return sorted(range(len(keys)), key=keys.__getitem__)


def _how_rows_differ(a: Predictions, b: Predictions) -> str:
    """The message that lists every kind of difference at once."""
    rows_a, rows_b = _unmatched(a, b), _unmatched(b, a)
    row_in_b = {b.keys[i].tobytes(): i for i in rows_b}
    relabelled = [(i, row_in_b[a.keys[i].tobytes()]) for i in rows_a if a.keys[i].tobytes() in row_in_b]
    names_a = {a.names[i] for i in rows_a} - {a.names[i] for i, _ in relabelled}
    names_b = {b.names[i] for i in rows_b} - {b.names[j] for _, j in relabelled}
    faults = [
        f"{len(names):,} {what} ({list_names(sorted(names))})"
        for names, what in (
            (names_a - names_b, "rows are in A alone"),
            (names_b - names_a, "rows are in B alone"),
            (names_a & names_b, "names stand for other images in B"),
        )
        if names
    ]
    if relabelled:
        i, j = relabelled[0]
        example = f"{display_name(a.names[i])} is {_shown(_label(a, i))} in A, {_shown(_label(b, j))} in B"
        faults.append(f"{len(relabelled):,} images have another label ({example})")
    return (
        f"the runs answered other rows: {'; '.join(faults)}. Compare runs that were judged on the same images and "
        "labels; train one of them again if its data are older."
    )


def _unmatched(of: Predictions, other: Predictions) -> list[int]:
    """Indices of the rows that `other` has not, or has fewer times."""
    left = collections.Counter(_identities(other))
    rows = []
    for i, identity in enumerate(_identities(of)):
        left[identity] -= 1
        if left[identity] < 0:
            rows.append(i)
    return rows


def _label(of: Predictions, row: int) -> str | list[str]:
    return _named(of, of.labels[row])


def _named(of: Predictions, answer: Any) -> str | list[str]:
    """A class name, or the names of a set."""
    if of.multi_label:
        return [of.class_names[c] for c in np.flatnonzero(answer)]
    return of.class_names[int(answer)]


def _shown(label: str | list[str]) -> str:
    return repr(display_name(label)) if isinstance(label, str) else "{" + ", ".join(map(_shown, label)) + "}"


def _flips(a: Predictions, b: Predictions) -> list[dict[str, Any]]:
    """Rows on which aligned runs differ, fixed ones first, then by name."""
    said_a, said_b = (of.logits >= 0 if of.multi_label else of.logits.argmax(axis=1) for of in (a, b))
    wide = (-1, len(a.class_names)) if a.multi_label else (-1, 1)
    right_a, right_b = ((said == a.labels).reshape(wide).all(axis=1) for said in (said_a, said_b))
    (rows,) = np.nonzero((said_a != said_b).reshape(wide).any(axis=1))
    changes = np.where(right_b, 0, np.where(right_a, 1, 2))  # both cannot be right where they differ
    return [
        {
            "path": display_name(a.names[i]),
            "label": _label(a, i),
            "a": _named(a, said_a[i]),
            "b": _named(a, said_b[i]),
            "change": _CHANGES[changes[i]],
        }
        for i in sorted(rows.tolist(), key=lambda i: (changes[i], a.names[i]))
    ]


def _verdict(name: str, low: float, high: float) -> str:
    if low <= 0 <= high:
        return "no difference shown"
    return "B is better" if (high < 0) == (name in LOSSES) else "A is better"


def _is_below(p_value: float | None) -> bool:
    """None, what was not tested, is not; 0, which underflow makes of many answers that all went one way, is."""
    return p_value is not None and p_value < _LEVEL


def _describe_classes(per_class: dict[str, dict[str, Any]]) -> list[str]:
    """The classes that differ beyond chance, their number considered; the largest difference first."""
    apart = [(name, facts) for name, facts in per_class.items() if _is_below(facts["p_value_holm"])]
    alone = sum(_is_below(facts["p_value"]) for facts in per_class.values())
    if not apart:
        beside = f" ({alone:,} would, taken alone: too few of {len(per_class):,})" if alone else ""
        return [f"no class shows a difference in accuracy{beside}"]
    apart.sort(key=lambda item: -abs(item[1]["difference"]))
    lines = [
        f"classes that show a difference in accuracy: {len(apart):,} of {len(per_class):,} "
        "(exact McNemar, p < 0.05 after Holm's correction for the number of classes; intervals are of each class alone)"
    ]
    for name, facts in apart[:_LISTED]:
        low, high = facts["interval_95"]
        lines.append(
            f"  {display_name(name)}: {facts['accuracy_a']:.4f} to {facts['accuracy_b']:.4f}  "
            f"{facts['difference']:+.4f} ({low:+.4f} to {high:+.4f})  n {facts['n']:,}, "
            f"corrected p = {facts['p_value_holm']:.2g}"
        )
    return lines
