"""`probe report`: writes the report of a run again, from its folder, its cache and its images."""

from typing import Any

from probe.config import ReportConfig
from probe.reporting.page import write_report


def report(config: ReportConfig) -> dict[str, Any]:
    """Writes report.html.

    Returns: what `write_report` does. Raises: what it does.
    """
    return write_report(
        config.run,
        images=config.images,
        cache=config.cache,
        method=config.map,
        out=config.out,
        num_workers=config.num_workers,
    )


def describe(result: dict[str, Any]) -> str:
    """The lines printed on stdout."""
    pictures = f"{result['num_thumbnails']:,} of {result['num_rows']:,} images with a picture"
    lines = [f"{result['report']}: {result['bytes'] / 1e6:.1f} MB, {pictures}"]
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])
