"""The saved classifier: a run folder that `predict` needs and nothing else does.

    manifest.json         SHA-256 of every other file of the run; written last, checked first
    classifier.json       format version, class names, feature view, head widths, which backbone it stands on
    head.safetensors      the head's parameters, float32, acting on raw embeddings (any scaling is folded in)
    preprocessor_config.json  how a picture becomes the backbone's input
    config.json           the configuration that made the run, and the versions that ran it
    metrics.json          its figures
    seen.safetensors      content keys of the rows that fitted or chose: on these it must not be judged
    predictions.safetensors    what it answered to each row that may judge it (see `probe.evaluation.predictions`)
    made.json             how it came about: command, time, machine, cache, images (see `probe.provenance`)
    report.html           the page that shows all this; made of the rest, and vouched for by nothing
    backbone/             the weights, where they were fine-tuned or asked for; else name, revision and
                          fingerprint in classifier.json say which backbone is meant

No pickle anywhere. The folder appears under its name only when it is complete.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from probe import storage
from probe.errors import CorruptError, InputError, MismatchError
from probe.heads import TrainedHead
from probe.notebook import facts, metrics_look

if TYPE_CHECKING:
    from probe.backbones import Backbone

FORMAT_VERSION = 1
_MANIFEST, _CLASSIFIER, _HEAD = "manifest.json", "classifier.json", "head.safetensors"
_PREPROCESSOR, _SEEN = "preprocessor_config.json", "seen.safetensors"
_BACKBONE_FOLDER = "backbone"
_CLASSES_SHOWN = 20
_PACKAGES = ("probe-jax", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn", "pillow")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneReference:
    """Which backbone a classifier stands on."""

    name: str
    """Hub id or folder, as a person knows it; it does not count when backbones are compared."""
    revision: str | None
    """Commit hash of a hub id."""
    fingerprint: str
    """Hex SHA-256 of config, weights and preprocessing: what makes two backbones the same."""
    decode: Literal["exact", "fast"] = "exact"
    """How the images were decoded that the head was trained on: `predict` does the same."""
    precision: dict[str, Any] | None = None
    """Arithmetic of the embeddings that the head was trained on, as `Precision.to_json` has it; none is float32."""

    def load(self, name: str | None = None) -> "Backbone":
        """Loads the backbone that is meant.

        Args:
          name: hub id or folder, where it is not where it was.
        Raises: MismatchError if what is found there is another backbone; InputError if nothing is.
        """
        from probe.backbones import load_backbone

        try:
            found = load_backbone(name) if name else load_backbone(self.name, revision=self.revision)
        except InputError as err:
            if name:
                raise
            raise InputError(
                f"the backbone {self.name!r} cannot be loaded: {str(err).rstrip('.')}. "
                "If it has moved, say where it is with --backbone."
            ) from err
        found = found.with_decode(self.decode)
        if found.fingerprint != self.fingerprint:
            raise MismatchError(
                f"{found.name}: its fingerprint is {found.fingerprint[:12]}, but the head was trained on "
                f"{self.name!r} with fingerprint {self.fingerprint[:12]}: weights, config or preprocessing differ. "
                "Give the original with --backbone, or train again on this one."
            )
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bundle:
    """A classifier as it was saved.

    `class_names` are in the order of the head's outputs; `view` names the embedding that the head reads;
    `folder` is the run folder.
    """

    folder: Path
    class_names: tuple[str, ...]
    multi_label: bool
    view: str
    head: TrainedHead
    backbone: BackboneReference
    finetuned: bool
    preprocessor_config: dict[str, Any]
    seen: frozenset[bytes]
    """SHA-256 of each image that fitted this classifier or chose between it and others."""

    def _repr_html_(self) -> str:
        kind = "k-NN" if "bank" in self.head.params else "MLP" if self.head.hidden else "linear"
        about = {
            "run": self.folder,
            "head": f"{kind}, on the view {self.view}",
            "backbone": self.backbone.name + (", fine-tuned" if self.finetuned else ""),
            "classes": f"{len(self.class_names):,}: {', '.join(self.class_names[:_CLASSES_SHOWN])}",
        }
        return facts("classifier", about) + metrics_look(json.loads((self.folder / "metrics.json").read_bytes()))

    def load_backbone(self, name: str | None = None) -> "Backbone":
        """Loads the backbone that the head was trained on.

        Args:
          name: hub id or folder, where the backbone is not where it was when the run was made.
        Raises: MismatchError if what is found there is another backbone; InputError if nothing is.
        """
        own_copy = self.folder / _BACKBONE_FOLDER
        if name is None and own_copy.is_dir():
            name = str(own_copy)
        return self.backbone.load(name)


def save(
    out: Path,
    *,
    head: TrainedHead,
    class_names: tuple[str, ...],
    view: str,
    backbone: BackboneReference,
    preprocessor_config: dict[str, Any],
    backbone_copy: "Backbone | None" = None,
    finetuned: bool = False,
    multi_label: bool = False,
    config: dict[str, Any],
    metrics: dict[str, Any],
    seen: frozenset[bytes] = frozenset(),
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a run folder, whole or not at all.

    Args:
      out: the run folder.
      head: what was trained, acting on raw embeddings of `view`.
      backbone: what the embeddings come from; for a fine-tuned one, the tuned weights' own reference.
      preprocessor_config: `Preprocessing.to_config()` of the backbone.
      backbone_copy: the backbone to write into the folder, fine-tuned or bundled.
      config: the verb's configuration as JSON values.
      metrics: what goes into metrics.json.
      seen: content keys of the images that fitted or chose, 32 bytes each.
      files: further files of the run, name to content (say, history.csv).
      overwrite: replace an earlier run under `out`.
    Raises: InputError as `require_free` does; StorageError if the disk fails.
    """
    assert backbone_copy is not None or not finetuned, "tuned weights exist nowhere else"
    classifier = {
        "format_version": FORMAT_VERSION,
        "class_names": list(class_names),
        "multi_label": multi_label,
        "view": view,
        "hidden": list(head.hidden),
        "finetuned": finetuned,
        "backbone": dataclasses.asdict(backbone),
    }
    contents = {
        _CLASSIFIER: _json_bytes(classifier),
        _HEAD: safetensors.numpy.save(_flat_arrays(head.params)),
        _PREPROCESSOR: _json_bytes(preprocessor_config),
        "config.json": _json_bytes({**config, "versions": versions()}),
        "metrics.json": _json_bytes(metrics),
        _SEEN: safetensors.numpy.save({"keys": np.frombuffer(b"".join(sorted(seen)), np.uint8).reshape(-1, 32)}),
        **(files or {}),
    }
    with storage.atomic_folder(out, replacing=_CLASSIFIER if overwrite else None) as folder:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        if backbone_copy is not None:
            from probe.backbones import save_backbone

            save_backbone(backbone_copy, folder / _BACKBONE_FOLDER)
        manifest = {
            str(path.relative_to(folder)): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
        }
        (folder / _MANIFEST).write_bytes(_json_bytes(manifest))


def require_free(out: Path, *, overwrite: bool) -> None:
    """Checks, before any work is done, that `save` may write `out`. Raises: InputError."""
    storage.require_free(out, replacing=_CLASSIFIER if overwrite else None)


def is_run(folder: Path) -> bool:
    """Whether a run, whole or not, stands there."""
    return all((folder / name).is_file() for name in (_MANIFEST, "metrics.json"))


def load(run: Path) -> Bundle:
    """Reads a run folder back and proves that no file of it is missing or changed.

    Raises: InputError if `run` is no run folder; CorruptError if a file is missing, damaged, or of a format
    version that this program does not know. All such files are listed at once.
    """
    if storage.is_remote(run):
        raise InputError(f"{run}: a run folder is read from this machine: copy it here, and give the copy")
    storage.recover_folder(run)
    if not (run / _MANIFEST).is_file():
        what = "not found" if not run.exists() else f"not a run folder: it has no {_MANIFEST}"
        raise InputError(f"{run}: {what}. Give the folder that `probe fit-linear` or `probe finetune` wrote to --out.")
    try:
        manifest = json.loads((run / _MANIFEST).read_bytes())
        faults = [fault for name, digest in manifest.items() if (fault := _fault(run / name, digest))]
    except (ValueError, AttributeError, TypeError) as err:
        raise CorruptError(f"{run / _MANIFEST}: damaged: {err}. Train again, or restore the file.") from err
    faults += [
        f"{name}: not in {_MANIFEST}" for name in (_CLASSIFIER, _HEAD, _PREPROCESSOR, _SEEN) if name not in manifest
    ]
    if faults:
        raise CorruptError(f"{run}: {'; '.join(faults)}. Restore the run folder from a copy, or train again.")
    classifier = json.loads((run / _CLASSIFIER).read_bytes())
    if classifier["format_version"] != FORMAT_VERSION:
        raise CorruptError(
            f"{run}: format version {classifier['format_version']}, but this program reads {FORMAT_VERSION}. "
            "Use the version of probe that config.json names, or train again."
        )
    return Bundle(
        folder=run,
        class_names=tuple(classifier["class_names"]),
        multi_label=classifier["multi_label"],
        view=classifier["view"],
        head=TrainedHead(
            hidden=tuple(classifier["hidden"]),
            params=unflatten_dict(safetensors.numpy.load((run / _HEAD).read_bytes()), sep="/"),
        ),
        backbone=BackboneReference(**classifier["backbone"]),
        finetuned=classifier["finetuned"],
        preprocessor_config=json.loads((run / _PREPROCESSOR).read_bytes()),
        seen=frozenset(map(bytes, safetensors.numpy.load((run / _SEEN).read_bytes())["keys"])),
    )


def find_ended(out: Path, config: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any] | None:
    """What metrics.json holds, if a run stands in `out` that this very configuration made; else None.

    Args:
      ignored: options that say how a run goes, and nothing of what it comes to.
    Raises: CorruptError as `load` does.
    """
    if storage.is_remote(out):
        return None
    storage.recover_folder(out)
    if not (out / _MANIFEST).is_file():
        return None
    load(out)
    made = json.loads((out / "config.json").read_bytes())
    if any(made.get(option) != value for option, value in config.items() if option not in ignored):
        return None
    return dict(json.loads((out / "metrics.json").read_bytes()))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages whose numbers a result depends on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def _flat_arrays(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    # safetensors stores the buffer as it lies, so a transposed view would come back wrong
    return {path: np.ascontiguousarray(leaf, np.float32) for path, leaf in flatten_dict(params, sep="/").items()}


def _fault(path: Path, digest: str) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    return None if _sha256(path) == digest else f"{path.name} is damaged"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_bytes(value: Any) -> bytes:
    return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"  # ASCII: a name may be no text at all
