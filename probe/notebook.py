"""How results and progress look in a notebook: tables and bars of HTML, every name in them escaped.

A verb's result is a dict of JSON values wherever it is used, and a table where a notebook shows it.
"""

import functools
import html
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from probe.sources import display_name

C = TypeVar("C")
Values = dict[str, Any]

ROWS_SHOWN = 100  # of a table of many

_FIGURES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "nll": "negative log-likelihood",
    "expected_calibration_error": "calibration error",
}


class Result(Values):
    """A dict of JSON values, with a look."""

    def __init__(self, values: Mapping[str, Any], look: Callable[[Values], str]) -> None:
        super().__init__(values)
        self._look = look

    def _repr_html_(self) -> str:
        return self._look(self)


def looks(look: Callable[[Values], str]) -> Callable[[Callable[[C], Values]], Callable[[C], Values]]:
    """Decorates a verb: what it returns is shown in a notebook as `look` says."""

    def decorate(verb: Callable[[C], Values]) -> Callable[[C], Values]:
        @functools.wraps(verb)
        def run(config: C) -> Values:
            return Result(verb(config), look)

        return run

    return decorate


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[Any]], *, note: str = "") -> str:
    """An HTML table; cells, caption and note are text. Numbers stand to the right."""

    def cell(value: Any) -> str:
        side, text = ("left", value) if isinstance(value, str) else ("right", f"{value:,}")
        return f"<td style='text-align:{side}'>{_escaped(text)}</td>"

    heads = "".join(f"<th style='text-align:left'>{_escaped(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    below = f"<p>{_escaped(note)}</p>" if note else ""
    heading = f"<caption style='text-align:left;white-space:nowrap'>{_escaped(caption)}</caption>"
    return f"<table>{heading}<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{below}"


def facts(caption: str, values: Mapping[str, Any]) -> str:
    """A table of two columns."""
    return table(caption, ("", ""), [(name, _shown(value)) for name, value in values.items()])


def figure(value: float | None, interval: Sequence[float] | None = None) -> str:
    """0.9550 (0.9250 to 0.9801)"""
    if value is None:
        return "unknown"
    return f"{value:.4f}" + (f" ({interval[0]:.4f} to {interval[1]:.4f})" if interval else "")


def metrics_look(metrics: Values) -> str:
    """What metrics.json says of each split, with 95 % intervals, and the warnings."""
    rows = []
    for name in ("train", "val", "test", "all"):
        of_split = metrics["splits"].get(name)
        if of_split is not None:
            cells = [figure(of_split.get(each), of_split.get(f"{each}_interval_95")) for each in _FIGURES]
            rows.append([name, of_split["n"], *cells])
    if baseline := metrics.get("baseline"):
        cells = [figure(baseline.get(each), baseline.get(f"{each}_interval_95")) for each in _FIGURES]
        rows.append([f"{baseline['split']}: scikit-learn, C = 1", baseline["n"], *cells])
    notes = list(metrics.get("warnings", ()))
    if "verdict" in metrics:
        notes.insert(0, f"saved: {metrics['verdict']['kept']}, {metrics['verdict']['why']}")
    return table("figures with 95 % intervals", ["split", "rows", *_FIGURES.values()], rows, note=". ".join(notes))


def in_notebook() -> bool:
    """Whether this runs in a kernel, which can show HTML and change it later."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return hasattr(get_ipython(), "kernel")


class Bar:
    """A line of text beside a bar, in the output of a notebook's cell; each `show` replaces the one before."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, line: str, share: float | None) -> None:
        """share: how much is done, from 0 to 1; None where nobody knows."""
        from IPython.display import HTML, display

        value = "" if share is None else f" value='{share:.4f}'"
        content = HTML(f"<progress max='1'{value} style='width:12em'></progress> {_escaped(line)}")
        if self._handle is None:
            self._handle = display(content, display_id=True)
        else:
            self._handle.update(content)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _escaped(text: str) -> str:
    return html.escape(display_name(text))
