"""What to do next: a few sentences that the figures of a run support, the most useful first."""

from collections.abc import Mapping, Sequence
from typing import Any

from probe.reporting.answers import Answers, Bin
from probe.reporting.charts import percent
from probe.sources import display_name


def next_steps(
    metrics: Mapping[str, Any], split: str | None, answers: Answers | None, bins: Sequence[Bin]
) -> list[tuple[str, str]]:
    """(heading, sentence) each.

    Args:
      split: whose figures are the headline; None where there are none.
      bins: of the reliability diagram.
    """
    if split is None or answers is None:
        return [("Hold rows out", "A test split is what tells how good the classifier is: keep some labelled images "
                 "in a folder test/.")]  # fmt: skip
    figures = metrics["splits"][split]
    return [
        step
        for step in (
            _mistakes(figures, answers),
            _more_labels(metrics, figures),
            _calibration(bins),
            _certainty(figures),
        )
        if step
    ]


def _mistakes(figures: Mapping[str, Any], answers: Answers) -> tuple[str, str] | None:
    wrong = int((~answers.correct).sum())
    if not wrong:
        return "Nothing is wrong here", "Every one of these rows is answered rightly: judge it on harder images."
    confusions = figures.get("confusions") or []
    text = f"{wrong:,} of {len(answers):,} rows are answered wrongly."
    if confusions:
        top = confusions[0]
        text += (
            f" Most often {display_name(top['label'])} is taken for {display_name(top['predicted'])} "
            f"({top['n']:,} times)."
        )
    return "Look at the mistakes", f"{text} The surest of them are the likeliest wrong labels."


def _more_labels(metrics: Mapping[str, Any], figures: Mapping[str, Any]) -> tuple[str, str] | None:
    curve = metrics.get("learning_curve")
    if not curve:
        return None
    now, twice = curve["points"][-1]["accuracy"], curve["extrapolation"][0]
    if twice["interval_95"] is None:
        return None  # too few draws or sizes to tell a promise from noise
    low, high = twice["interval_95"]
    share, interval = percent(twice["accuracy"], 1), f"{100 * low:.1f} to {percent(high, 1)}"
    expected = f"Twice as many labels are expected to give {share} ({interval})"
    if low > now:
        return "Label more images", f"{expected}, where there is {percent(now, 1)} now."
    return "More of the same labels promise little", f"{expected}; there is {percent(now, 1)} now."


def _calibration(bins: Sequence[Bin]) -> tuple[str, str] | None:
    """A word where confidence and truth differ over all rows by more than chance would have it."""
    n = sum(bin.n for bin in bins)
    claimed = sum(bin.n * bin.confidence for bin in bins) / n
    true = sum(bin.n * bin.share for bin in bins) / n
    noise = 1.96 * (claimed * (1 - claimed) / n) ** 0.5
    if abs(claimed - true) <= max(noise, 0.01):
        return None
    heading = "Probabilities are too high" if claimed > true else "Probabilities are too low"
    return (
        heading,
        f"On average it claims {percent(claimed, 1)} and {percent(true, 1)} come true: set thresholds on data.",
    )


def _certainty(figures: Mapping[str, Any]) -> tuple[str, str] | None:
    low, high = figures["accuracy_interval_95"]
    if high - low < 0.04:
        return None
    return (
        "Judge on more images",
        f"{figures['n']:,} rows leave {100 * (high - low):.0f} points between {percent(low, 1)} and "
        f"{percent(high, 1)}; four times as many would halve that.",
    )
