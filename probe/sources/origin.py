"""Where images came from, as JSON values: what it takes to open the same source again."""

import dataclasses
from pathlib import Path
from typing import Any

from probe.sources.opening import open_source
from probe.sources.rows import Columns
from probe.sources.source import Source
from probe.storage import locate


def describe_origin(images: Path, columns: Columns | None = None, image_root: Path | None = None) -> dict[str, Any]:
    """What `reopen` takes: the arguments that `open_source` was given, paths made absolute."""
    return {
        "images": str(images.absolute()),
        "image_root": None if image_root is None else str(image_root.absolute()),
        "columns": dataclasses.asdict(columns or Columns()),
    }


def reopen(origin: dict[str, Any]) -> Source:
    """Opens the images again, without their labels. Raises: InputError if they are not there any more."""
    columns = Columns(**{**origin["columns"], "labels": tuple(origin["columns"]["labels"])})
    root = origin["image_root"]
    return open_source(
        locate(origin["images"]), labelled=False, columns=columns, image_root=None if root is None else locate(root)
    )
