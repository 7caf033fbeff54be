"""What an audit found, as a section of a run's report or as a page of its own."""

import json
from pathlib import Path
from typing import Any

from probe.reporting.rendering import render_page
from probe.reporting.thumbnails import Thumbnails, load_thumbnails
from probe.sources.origin import describe_origin
from probe.storage import atomic_write_bytes

JSON_NAME = "audit.json"
_SHOWN = 24  # findings of each kind that are shown; audit.csv has all
TITLES = {
    "exact duplicate": "Exact duplicates",
    "near duplicate": "Near duplicates",
    "lookalike": "Look alike to the backbone",
    "label": "Labels that are likely wrong",
    "classes": "Classes that are hard to tell apart",
    "group": "Groups in more than one split",
    "outlier": "Outliers",
}


def audit_context(path: Path, origin: dict[str, Any] | None) -> dict[str, Any]:
    """What the template `audit.html` shows of an audit.json, with pictures where the images are still there."""
    found = json.loads(path.read_bytes())
    sections = []
    wanted: dict[int, tuple[bytes, bytes]] = {}
    for kind, count in found["counts"].items():
        lines = [finding for finding in found["findings"] if finding["kind"] == kind][:_SHOWN]
        for line in lines:
            for slot, name, key in (("picture", "path", "key"), ("other_picture", "other", "other_key")):
                line[slot] = None
                if line[name] is not None:
                    line[slot] = len(wanted)
                    wanted[len(wanted)] = (line[name].encode("utf-8", "surrogateescape"), bytes.fromhex(line[key]))
        sections.append({"kind": kind, "title": TITLES[kind], "count": count, "lines": lines})
    pictures: Thumbnails = load_thumbnails(origin, wanted) if wanted else Thumbnails({}, None)
    return {**found, "sections": sections, "uris": pictures.uris, "missing": pictures.missing}


def write_audit_page(out: Path, *, images: Path | None, origin: dict[str, Any] | None) -> Path:
    """Writes audit.html beside audit.json. Raises: StorageError."""
    audit = audit_context(out / JSON_NAME, describe_origin(images) if images is not None else origin)
    path = out / "audit.html"
    atomic_write_bytes(path, render_page("audit_page.html", {"audit": audit, "title": "Audit", "data": {"rows": None}}))
    return path
