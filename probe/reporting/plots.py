"""Which plots the figures of a run give: each function takes what metrics.json says and makes charts of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from probe.evaluation.intervals import share_interval
from probe.reporting.answers import Bin
from probe.reporting.charts import Chart, IntervalChart, Series, interval_chart, line_chart, number, percent


def comparisons(metrics: Mapping[str, Any], split: str) -> IntervalChart | None:
    """Accuracy of the run beside that of what one would do without it, on the same split where that is known."""
    figures = metrics["splits"].get(split, {})
    if figures.get("accuracy") is None:
        return None
    lines = [("this classifier", figures["accuracy"], figures["accuracy_interval_95"], _rows(figures["n"]), True)]
    for key, name in (("baseline", "scikit-learn default"), ("zero_shot", "zero-shot, by names")):
        other = metrics.get(key)
        if isinstance(other, Mapping) and other.get("accuracy") is not None and other.get("split", split) == split:
            interval = other.get("accuracy_interval_95")
            lines.append((name, other["accuracy"], interval, _rows(other.get("n", figures["n"])), False))
    lines += [line for line in [_majority(metrics, figures)] if line]
    return interval_chart(lines)


def verdict(metrics: Mapping[str, Any]) -> IntervalChart | None:
    """The probe against the fine-tuned classifier, on validation rows that neither chose on."""
    found = metrics.get("verdict")
    if not found or "probe" not in found:
        return None
    n, lines = found["n"], []
    for key, name in (("probe", "linear probe"), ("finetuned", "fine-tuned"), ("interpolated", "between, best α")):
        accuracy = found[key]["accuracy"]
        own = key == ("probe" if found["kept"] == "probe" else "interpolated")
        lines.append((name, accuracy, share_interval(round(accuracy * n), n), _rows(n), own))
    return interval_chart(lines)


def reliability_chart(saved: Sequence[Bin], other: Sequence[Bin] | None, name_of_other: str) -> Chart:
    """What was claimed against what came true, by the run as it is saved, and before or after temperature scaling."""
    most = max(bin.n for bin in saved)
    series = []
    for bins, name, colour in ((other or (), name_of_other, 1), (saved, "as saved", 0)):
        series.append(
            Series(
                name=name,
                x=[bin.confidence for bin in bins],
                y=[bin.share for bin in bins],
                low=[bin.interval[0] for bin in bins] if colour == 0 else (),
                high=[bin.interval[1] for bin in bins] if colour == 0 else (),
                radii=[2.5 + 5.5 * (bin.n / most) ** 0.5 for bin in bins],
                titles=[
                    f"{name}: {bin.n:,} answers of confidence {percent(bin.confidence, 1)}, "
                    f"{percent(bin.share, 1)} right"
                    for bin in bins
                ],
                kind="dots" if colour == 0 else "rings",
                colour=colour,
            )
        )
    return line_chart(
        series,
        title="Reliability diagram",
        description="Share of answers that came true against the confidence that was claimed, in 15 bins. "
        "On the diagonal, probabilities mean what they say.",
        x_label="confidence",
        y_label="share that is right",
        square=True,
    )


_FIGURES = {  # of a curve over λ, and their axis
    "accuracy": "accuracy",
    "label_accuracy": "share of right labels",
    "nll": "nats per row",
    "squared_error": "squared error",
}


def choice_charts(metrics: Mapping[str, Any]) -> list[Chart]:
    """How what was chosen was chosen: λ, neighbours, or how far to go from the start."""
    charts = []
    curves = metrics.get("curves", [])
    if curves and "points" in curves[0]:
        chosen = (metrics["penalty"], f"λ {number(metrics['penalty'])}") if metrics.get("penalty") else None
        for figure, label in _FIGURES.items():
            series = []
            for colour, curve in enumerate(curves):
                points = [point for point in curve["points"] if point["penalty"] > 0 and figure in point]
                errors = [point.get(f"{figure}_se") for point in points]
                several = [error is not None for error in errors]
                series.append(
                    Series(
                        name=f"{curve['view']}, {curve['scaling']}",
                        x=[point["penalty"] for point in points],
                        y=[point[figure] for point in points],
                        low=[p[figure] - e for p, e in zip(points, errors, strict=True)] if all(several) else (),
                        high=[p[figure] + e for p, e in zip(points, errors, strict=True)] if all(several) else (),
                        colour=colour,
                    )
                )
            if any(len(one.x) for one in series):
                charts.append(
                    line_chart(
                        series,
                        title=f"{'Negative log-likelihood' if figure == 'nll' else label.capitalize()} by λ",
                        description=f"{label} on rows left out, for each strength of the regularisation λ"
                        + (", with one standard error" if figure != "squared_error" else "")
                        + ("" if chosen is None else f". Chosen: {chosen[1]}."),
                        x_label="λ, strength of the regularisation",
                        y_label=label,
                        log_x=True,
                        chosen=chosen if chosen and _spans(series, chosen[0]) else None,
                        percent_y=figure.endswith("accuracy"),
                    )
                )
    elif curves and "num_neighbours" in curves[0]:
        charts.append(
            line_chart(
                [
                    Series(
                        name="accuracy",
                        x=[point["num_neighbours"] for point in curves],
                        y=[point["accuracy"] for point in curves],
                    )
                ],
                title="Accuracy by number of neighbours",
                description="Accuracy on rows left out, for each number of neighbours that vote.",
                x_label="neighbours",
                y_label="accuracy",
                log_x=True,
                chosen=(metrics["num_neighbours"], f"{metrics['num_neighbours']}"),
                percent_y=True,
            )
        )
    wise = metrics.get("wise_curve", [])
    if len(wise) > 1:
        charts.append(
            line_chart(
                [Series(name="accuracy", x=[p["alpha"] for p in wise], y=[p["accuracy"] for p in wise])],
                title="Accuracy between start and end",
                description="Validation accuracy of weights a share α of the way from the start to the end.",
                x_label="α: 0 is the probe, 1 fully fine-tuned",
                y_label="accuracy",
                chosen=(metrics["chosen_alpha"], f"α {metrics['chosen_alpha']:g}"),
                percent_y=True,
            )
        )
    return charts


def history_charts(metrics: Mapping[str, Any]) -> list[Chart]:
    """Loss and accuracy by epoch, where there were epochs."""
    history = metrics.get("history", [])
    if len(history) < 2:
        return []
    epochs = [line["epoch"] for line in history]
    chosen = metrics.get("epoch") or metrics.get("chosen_epoch") or None
    first = min(epochs)
    charts = []
    for figure, label in (("loss", "nats per image"), ("accuracy", "accuracy")):
        charts.append(
            line_chart(
                [
                    Series(name="training", x=epochs, y=[line[f"train_{figure}"] for line in history], colour=1),
                    Series(name="validation", x=epochs, y=[line[f"val_{figure}"] for line in history], colour=0),
                ],
                title=f"{figure.capitalize()} by epoch",
                description=f"{label} on training batches, on the way, and on validation rows after each epoch.",
                x_label="epoch",
                y_label=label,
                chosen=(chosen, f"epoch {chosen}") if chosen and first <= chosen <= max(epochs) else None,
                percent_y=figure == "accuracy",
            )
        )
    return charts


def _spread(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One deviation to either side of each accuracy; nothing where single draws have none."""
    if any(point["deviation"] is None for point in points):
        return {}
    return {
        "low": [point["accuracy"] - point["deviation"] for point in points],
        "high": [point["accuracy"] + point["deviation"] for point in points],
    }


def learning_charts(metrics: Mapping[str, Any]) -> list[Chart]:
    """Accuracy against the number of labels, measured and expected; and with few of each class."""
    charts = []
    curve = metrics.get("learning_curve")
    if curve:
        measured, expected = curve["points"], curve["extrapolation"]
        sure = all(point["interval_95"] is not None for point in expected)
        charts.append(
            line_chart(
                [
                    Series(
                        name="measured, ± deviation over draws",
                        x=[point["n"] for point in measured],
                        y=[point["accuracy"] for point in measured],
                        **_spread(measured),
                    ),
                    Series(
                        name="expected, 95 %" if sure else "expected",
                        x=[measured[-1]["n"], *(point["n"] for point in expected)],
                        y=[measured[-1]["accuracy"], *(point["accuracy"] for point in expected)],
                        low=[None, *(point["interval_95"][0] for point in expected)] if sure else (),
                        high=[None, *(point["interval_95"][1] for point in expected)] if sure else (),
                        kind="dashed",
                        colour=1,
                    ),
                ],
                title="Accuracy by number of labels",
                description="Measured on growing parts of the training rows, and extrapolated by a power law to twice "
                "and four times as many.",
                x_label="labelled training images",
                y_label="accuracy",
                log_x=True,
                percent_y=True,
            )
        )
    few = metrics.get("few_shot", [])
    if len(few) > 1:
        charts.append(
            line_chart(
                [
                    Series(
                        name="accuracy",
                        x=[line["shots"] for line in few],
                        y=[line["accuracy"] for line in few],
                        **_spread(few),
                    )
                ],
                title="Accuracy with few labels of each class",
                description="Accuracy of heads fitted to a few rows of each class, with the deviation over draws.",
                x_label="labelled images of each class",
                y_label="accuracy",
                log_x=True,
                percent_y=True,
            )
        )
    return charts


def _majority(
    metrics: Mapping[str, Any], figures: Mapping[str, Any]
) -> tuple[str, float, Sequence[float] | None, str, bool] | None:
    """Always to say the class that is the most frequent in train."""
    train = metrics["splits"].get("train", {}).get("per_class")
    if not train or "confusions" not in figures:
        return None
    name = max(train, key=lambda name: train[name]["n"])
    hits = figures["per_class"].get(name, {}).get("n", 0)
    return "most frequent class", hits / figures["n"], share_interval(hits, figures["n"]), _rows(figures["n"]), False


def _spans(series: Sequence[Series], x: float) -> bool:
    every = [value for one in series for value in one.x]
    return min(every) <= x <= max(every)


def _rows(n: int) -> str:
    return f"n {n:,}"
