"""Writes what was measured of probe-tiny into README.md beside this file, between its two marks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- measured: written by report.py -->\n", "<!-- end of what was measured -->\n"


def write(metrics: Mapping[str, Any]) -> None:
    """Replaces the part between the marks."""
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + "\n" + text(metrics) + "\n" + END + after)


def text(metrics: Mapping[str, Any]) -> str:
    """The tables, in Markdown.

    Args:
      metrics: what `python -m data.pretrain` writes to metrics.json, with `transfer.measure`'s under "transfer".
    """
    last, sizes = metrics["curve"][-1], metrics["parameters"]
    lines = [
        f"Trained for {last['step']:,} steps of {metrics['batch_size']} pairs, in {last['seconds'] / 60:,.0f} minutes, "
        f"on {metrics['pictures']:,} pictures; {sizes['vision']:,} parameters see and {sizes['text']:,} read.",
        "",
        "| step | loss (nats) | right caption of a batch | learning rate |",
        "|---|---|---|---|",
        *(
            f"| {line['step']:,} | {line['loss']:.3f} | {line['accuracy']:.1%} | {line['rate']:.1e} |"
            for line in metrics["curve"]
        ),
        "",
        "The name of a picture, looked for among that many names:",
        "",
        "| question | pictures | names | first | among the first 5 | median rank | first by chance |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {question} | {f['pictures']:,} | {f['names']:,} | {f['top_1']:.1%} | {f['top_5']:.1%} "
            f"| {f['median_rank']} | {f['top_1_by_chance']:.2%} |"
            for question, f in metrics["retrieval"].items()
        ),
        "",
        "Linear probes by `probe fit-linear`, accuracy on the test split with its 95 % interval:",
        "",
        "| images | features | accuracy | interval | test images |",
        "|---|---|---|---|---|",
    ]
    for images, rows in metrics["transfer"].items():
        for features, f in rows.items():
            low, high = f["accuracy_interval_95"]
            lines.append(f"| {images} | {features} | {f['accuracy']:.3f} | {low:.3f} to {high:.3f} | {f['n']:,} |")
    return "\n".join(lines) + "\n"
