"""`probe audit`: what is likely wrong with the data, from the cache; the images themselves are never touched."""

import csv
import io
import itertools
import json
import os
import shlex
from pathlib import Path
from typing import Any

import numpy as np

from probe import storage
from probe.auditing import answers, copies, labels, neighbours
from probe.cache import Cache
from probe.config import AuditConfig
from probe.errors import ConfigError, InputError
from probe.evaluation.intervals import share_interval
from probe.reporting.audit_page import JSON_NAME, write_audit_page
from probe.reporting.page import write_report
from probe.sources import display_name
from probe.sources.origin import describe_origin
from probe.spreadsheet import inert

CSV_NAME = "audit.csv"
_COLUMNS = ("kind", "score", "path", "split", "label", "suggested", "other", "action", "detail")
_MOST_PAIRS = 200  # of classes, that are looked at
_KEEP_FIRST = {"test": 0, "val": 1, "train": 2, "": 2}  # of copies, the one that judges stays
_LISTED = 5


def audit(config: AuditConfig) -> dict[str, Any]:
    """Looks for what is wrong, and writes audit.csv, audit.json and a page: the run's report, or audit.html.

    Returns: counts by kind; findings, the surest of each kind first; pairs of classes that are hard to tell apart and
      groups that stand in several splits, each a finding too; accuracy of test rows with and without those that have
      copies elsewhere; and where all that was written.
    Raises: InputError where there is too little to look at; MismatchError if the run is not of this cache; ConfigError
      for --fix where the images are in no folder; StorageError.
    """
    out = config.out or config.run or Path("audit")
    for name in (CSV_NAME, JSON_NAME):
        storage.require_file(out / name, overwrite=config.overwrite)
    if config.fix is not None:
        storage.require_file(config.fix, overwrite=config.overwrite)
    cache = Cache.open(config.cache)
    root = None if config.fix is None else _image_root(cache, config)
    if len(cache.table) < 3:
        raise InputError(f"{config.cache}: {len(cache.table)} embeddings are too few to look at")
    embeddings = cache.embeddings()
    indices, distances = neighbours.nearest(embeddings)
    exact = _exact(cache.table.keys)
    known = {tuple(sorted(pair)) for pair in exact}
    notes: list[str] = []
    near, alike = _near(cache, config, indices, distances, known, notes)
    clusters = neighbours.clusters([*exact, *((a, b) for a, b, _ in near)], len(cache.table))
    families = neighbours.clusters([*exact, *((a, b) for a, b, _ in [*near, *alike])], len(cache.table))
    findings = _copies(cache, near, clusters) + _alike(cache, alike)
    probabilities = None
    if cache.multi_label:
        notes.append("labels are not judged where an image may have several")
    elif config.run is not None:
        probabilities = answers.of_run(config.run, cache)
    else:
        probabilities = answers.fitted_now(cache, embeddings, families, config.seed)
    pairs: list[dict[str, Any]] = []
    accuracy = None
    if probabilities is not None:
        rows = np.flatnonzero(~np.isnan(probabilities).any(axis=1) & (cache.table.labels >= 0))
        findings += _labels(cache, probabilities, rows)
        pairs = _pairs(cache, probabilities, rows)
        findings += _hard_to_tell(cache, probabilities, rows, pairs)
        accuracy = _accuracy(cache, probabilities, rows, clusters)
    groups = _groups(cache)
    findings += _leaking(cache, groups)
    findings += [
        _finding(cache, "outlier", row, score / (1 + score), detail=f"{score:.1f} deviations beyond the median")
        for row, score in neighbours.outliers(distances)
    ]
    result = {
        "cache": cache.reference,
        "run": None if config.run is None else str(config.run),
        "num_rows": len(cache.table),
        "counts": _counts(findings),
        "accuracy": accuracy,
        "pairs": pairs,
        "groups": groups,
        "findings": findings,
        "notes": notes,
    }
    storage.atomic_write_bytes(out / CSV_NAME, _csv(findings))
    storage.atomic_write_bytes(out / JSON_NAME, json.dumps(result, indent=1).encode() + b"\n")
    result |= {"csv": str(out / CSV_NAME), "fix": None}
    if config.fix is not None:
        assert root is not None
        storage.atomic_write_bytes(config.fix, _manifest(cache, findings))
        result["fix"] = {"manifest": str(config.fix), "image_root": str(root), "num_rows": len(_kept(cache, findings))}
    if config.run is not None:
        page = write_report(config.run, images=config.images, audit=out / JSON_NAME, fallback=config.cache)
        result["page"] = page["report"]
    else:
        origin = cache.origin
        result["page"] = str(write_audit_page(out, images=config.images, origin=origin))
    return result


def describe(result: dict[str, Any]) -> str:
    """The findings as lines for people."""
    lines = [f"{result['num_rows']:,} images: " + (", ".join(f"{n:,} {kind}" for kind, n in result["counts"].items())
             or "nothing found")]  # fmt: skip
    for kind in result["counts"]:
        if kind in ("classes", "group"):
            continue  # named below, without images
        of_kind = [finding for finding in result["findings"] if finding["kind"] == kind]
        lines += [f"  {kind} {finding['score']:.2f}  {_line(finding)}" for finding in of_kind[:_LISTED]]
        if len(of_kind) > _LISTED:
            lines.append(f"  and {len(of_kind) - _LISTED:,} more, see {result['csv']}")
    for pair in result["pairs"][:_LISTED]:
        lines.append(
            f"hard to tell apart: {display_name(pair['a'])} and {display_name(pair['b'])} "
            f"(area under the curve {pair['area']:.3f}, {pair['confusions']:,} confusions)"
        )
    for group in result["groups"][:_LISTED]:
        lines.append(f"group {display_name(group['group'])} stands in {', '.join(group['splits'])}")
    if accuracy := result["accuracy"]:
        lines.append(
            f"test accuracy {accuracy['all']['accuracy']:.4f} of {accuracy['all']['n']:,} rows; without the "
            f"{accuracy['num_leaked']:,} that have a copy in train or validation: "
            + (f"{accuracy['clean']['accuracy']:.4f}" if accuracy["clean"] else "none is left")
        )
    if fix := result["fix"]:
        command = shlex.join(["probe", "embed", fix["manifest"], "--image-root", fix["image_root"]])
        lines.append(f"{fix['manifest']}: {fix['num_rows']:,} images are left: `{command} --backbone … --out …`")
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join([*lines, f"written: {result['csv']}, {result['page']}"])


def _finding(
    cache: Cache,
    kind: str,
    row: int,
    score: float,
    *,
    suggested: int | None = None,
    other: int | None = None,
    drop: bool = False,
    detail: str = "",
) -> dict[str, Any]:
    """One line: score from 0 to 1, the surer the higher; paths as they are shown, keys to find the images by."""
    table = cache.table
    label = "" if cache.multi_label or table.labels[row] < 0 else cache.class_names[table.labels[row]]
    return {
        "kind": kind,
        "score": round(float(score), 4),
        "row": row,
        "path": os.fsdecode(table.names[row]),
        "key": bytes(table.keys[row]).hex(),
        "split": str(table.splits[row]),
        "label": label,
        "suggested": None if suggested is None else cache.class_names[suggested],
        "other": None if other is None else os.fsdecode(table.names[other]),
        "other_key": None if other is None else bytes(table.keys[other]).hex(),
        "action": "drop" if drop else "look",
        "detail": detail,
    }


def _exact(keys: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (first row, later row) of equal content."""
    first: dict[bytes, int] = {}
    pairs = []
    for row, key in enumerate(map(bytes, keys)):
        if first.setdefault(key, row) != row:
            pairs.append((first[key], row))
    return pairs


_Pairs = list[tuple[int, int, float]]


def _near(
    cache: Cache,
    config: AuditConfig,
    indices: np.ndarray,
    distances: np.ndarray,
    exact: set[tuple[int, ...]],
    notes: list[str],
) -> tuple[_Pairs, _Pairs]:
    """Near duplicates, and pairs that only the backbone takes for such: their pixels were compared, and differ."""
    origin = cache.origin if config.images is None else describe_origin(config.images)
    blocks, missing = copies.read_blocks(origin, cache.table.names, cache.table.keys)
    if missing:
        notes.append(f"smaller copies were not looked for everywhere: {missing}")
    by_pixels = [pair for pair in copies.copies(blocks) if pair[:2] not in exact]
    known = {pair[:2] for pair in by_pixels} | exact
    by_backbone = [pair for pair in neighbours.near_duplicates(indices, distances) if pair[:2] not in known]
    has_pixels = ~np.isnan(blocks[:, 0])
    differ = [bool(has_pixels[a] and has_pixels[b]) for a, b, _ in by_backbone]
    alike = list(itertools.compress(by_backbone, differ))
    return by_pixels + [pair for pair, is_known in zip(by_backbone, differ, strict=True) if not is_known], alike


def _alike(cache: Cache, pairs: _Pairs) -> list[dict[str, Any]]:
    """One finding a pair, those across splits first."""
    findings = []
    for row, other, score in pairs:
        a, b = (str(cache.table.splits[one]) or "train" for one in (row, other))
        detail = f"across splits: {a} and {b}" if a != b else ""
        findings.append(_finding(cache, "lookalike", row, score, other=other, detail=detail))
    return sorted(findings, key=lambda one: (not one["detail"], -one["score"]))


def _copies(cache: Cache, near: _Pairs, clusters: np.ndarray) -> list[dict[str, Any]]:
    """Each row that is a copy of another, marked: of a set of copies the one that judges stays, or the first."""
    table = cache.table
    rank = np.array([_KEEP_FIRST[split] for split in table.splits.tolist()])
    order = np.lexsort((np.arange(len(table)), rank, clusters))
    keeper = {int(clusters[row]): int(row) for row in order[::-1]}
    likeness: dict[int, float] = {}
    for a, b, score in near:
        likeness[a], likeness[b] = max(score, likeness.get(a, 0)), max(score, likeness.get(b, 0))
    findings = []
    for row in range(len(table)):
        other = keeper[int(clusters[row])]
        if other == row:
            continue
        same = bytes(table.keys[row]) == bytes(table.keys[other])
        kind, score = ("exact duplicate", 1.0) if same else ("near duplicate", likeness.get(row, 1.0))
        details = []
        if table.splits[row] != table.splits[other]:
            details.append(f"across splits: {table.splits[row] or 'train'} and {table.splits[other] or 'train'}")
        if not cache.multi_label and table.labels[row] != table.labels[other]:
            details.append("under different labels")
        findings.append(_finding(cache, kind, row, score, other=other, drop=True, detail="; ".join(details)))
    # Across splits first: these change a figure
    findings.sort(key=lambda one: (one["kind"], not one["detail"].startswith("across"), -one["score"]))
    return findings


def _labels(cache: Cache, probabilities: np.ndarray, rows: np.ndarray) -> list[dict[str, Any]]:
    found = labels.label_errors(probabilities[rows], cache.table.labels[rows])
    return [
        _finding(
            cache,
            "label",
            int(rows[at]),
            score,
            suggested=int(suggested),
            # A test split without the rows that are answered wrongly would judge nothing
            drop=cache.table.splits[rows[at]] in ("train", ""),
        )
        for at, suggested, score in zip(found.rows, found.suggested, found.scores, strict=True)
    ]


def _pairs(cache: Cache, probabilities: np.ndarray, rows: np.ndarray) -> list[dict[str, Any]]:
    found = labels.inseparable(probabilities[rows], cache.table.labels[rows], _MOST_PAIRS)
    names = cache.class_names
    return [{"a": names[a], "b": names[b], "area": area, "confusions": n} for a, b, area, n in found]


def _hard_to_tell(
    cache: Cache, probabilities: np.ndarray, rows: np.ndarray, pairs: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One finding a pair of classes: of either the row that looks most like the other. Score 0 at an area under the
    curve of 1, 1 at that of chance."""
    labels_of, found = cache.table.labels[rows], []
    for pair in pairs:
        a, b = (cache.class_names.index(pair[key]) for key in ("a", "b"))
        odds = probabilities[rows, b] - probabilities[rows, a]
        row = rows[np.where(labels_of == a, odds, -np.inf).argmax()]
        other = rows[np.where(labels_of == b, -odds, -np.inf).argmax()]
        detail = f"area under the curve {pair['area']:.3f}, {pair['confusions']:,} confusions"
        score = min(1.0, 2 * (1 - pair["area"]))
        found.append(_finding(cache, "classes", int(row), score, suggested=b, other=int(other), detail=detail))
    return found


def _leaking(cache: Cache, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One finding a group that stands in several splits: its first row in train, or else in validation, and its
    first in what judges that."""
    table = cache.table
    first: dict[tuple[str, str], int] = {}
    for row, (group, split) in enumerate(zip(table.groups.tolist(), table.splits.tolist(), strict=True)):
        first.setdefault((group, split or "train"), row)
    found = []
    for one in groups:
        other, row = sorted(one["splits"], key=lambda split: _KEEP_FIRST[split])[:: len(one["splits"]) - 1]
        counts = ", ".join(f"{n:,} in {split}" for split, n in one["splits"].items())
        detail = f"{display_name(one['group'])}: {counts}"
        rows = first[one["group"], row], first[one["group"], other]
        found.append(_finding(cache, "group", rows[0], 1.0, other=rows[1], detail=detail))
    return found


def _accuracy(cache: Cache, probabilities: np.ndarray, rows: np.ndarray, clusters: np.ndarray) -> dict[str, Any] | None:
    """Of test rows, all and those without a copy in train or validation."""
    splits = cache.table.splits
    test = rows[splits[rows] == "test"]
    if not len(test):
        return None
    leaked = np.isin(clusters[test], clusters[splits != "test"])
    correct = probabilities[test].argmax(axis=1) == cache.table.labels[test]

    def figures(of: np.ndarray) -> dict[str, Any] | None:
        if not of.any():
            return None
        hits, n = int(correct[of].sum()), int(of.sum())
        return {"n": n, "accuracy": hits / n, "accuracy_interval_95": share_interval(hits, n)}

    return {"num_leaked": int(leaked.sum()), "all": figures(np.ones(len(test), bool)), "clean": figures(~leaked)}


def _groups(cache: Cache) -> list[dict[str, Any]]:
    """Groups with rows in more than one split."""
    table = cache.table
    found: dict[str, dict[str, int]] = {}
    for group, split in zip(table.groups.tolist(), table.splits.tolist(), strict=True):
        if group:
            counts = found.setdefault(group, {})
            counts[split or "train"] = counts.get(split or "train", 0) + 1
    return [{"group": group, "splits": counts} for group, counts in sorted(found.items()) if len(counts) > 1]


def _counts(findings: list[dict[str, Any]]) -> dict[str, int]:
    kinds = [finding["kind"] for finding in findings]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _line(finding: dict[str, Any]) -> str:
    words = [display_name(finding["path"])]
    if finding["suggested"]:
        words.append(f"is labelled {display_name(finding['label'])}, looks like {display_name(finding['suggested'])}")
    if finding["other"]:
        words.append(f"= {display_name(finding['other'])}")
    return " ".join(words) + (f" ({finding['detail']})" if finding["detail"] else "")


def _csv(findings: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for finding in findings:
        writer.writerow(["" if (value := finding[name]) is None else inert(str(value)) for name in _COLUMNS])
    return text.getvalue().encode(errors="surrogateescape")


def _image_root(cache: Cache, config: AuditConfig) -> Path:
    """The folder that the cache's names are relative to. Raises: ConfigError."""
    if cache.multi_label:
        raise ConfigError("--fix writes one label a row, and these images may have several")
    origin = cache.origin
    if config.images is not None:
        return config.images.absolute()
    if origin is None:
        raise ConfigError("--fix needs to know where the images are: give the folder with --images")
    path = Path(origin["images"])
    if path.suffix.lower() in (".csv", ".tsv", ".jsonl"):
        return Path(origin["image_root"] or path.parent)
    if not path.is_dir():
        raise ConfigError(f"--fix: {path} is no folder of images (any more): a manifest cannot name what is in it")
    return path


def _kept(cache: Cache, findings: list[dict[str, Any]]) -> list[int]:
    dropped = {finding["row"] for finding in findings if finding["action"] == "drop"}
    return [row for row in range(len(cache.table)) if row not in dropped]


def _manifest(cache: Cache, findings: list[dict[str, Any]]) -> bytes:
    table, text = cache.table, io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "split", "group"])
    for row in _kept(cache, findings):
        label = "" if table.labels[row] < 0 else cache.class_names[table.labels[row]]
        writer.writerow([os.fsdecode(table.names[row]), label, table.splits[row], table.groups[row]])
    return text.getvalue().encode(errors="surrogateescape")
