"""Cells of CSV files that people open in a spreadsheet."""

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")  # a spreadsheet would run such a cell (OWASP)


def inert(cell: str) -> str:
    """The cell as text that a spreadsheet shows and does not run."""
    return f"'{cell}" if cell.startswith(_FORMULA_STARTS) else cell
