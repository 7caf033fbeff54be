"""Sources: where examples come from, as records in a fixed order and a way to their bytes."""

from probe.sources.folders import IMAGE_SUFFIXES
from probe.sources.opening import open_source
from probe.sources.rows import Columns
from probe.sources.several import open_images
from probe.sources.source import Example, Source, check_labels, display_name, list_names

__all__ = [
    "IMAGE_SUFFIXES",
    "Columns",
    "Example",
    "Source",
    "check_labels",
    "display_name",
    "list_names",
    "open_images",
    "open_source",
]
