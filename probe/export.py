"""`probe export`: a run in a form that other programs read, without this one."""

from pathlib import Path
from typing import Any

from probe import bundle
from probe.config import ExportConfig
from probe.errors import InputError
from probe.exporting.classifier import Classifier
from probe.exporting.hub import to_hub
from probe.exporting.onnx_file import to_onnx
from probe.exporting.stablehlo import FACTS, to_stablehlo
from probe.exporting.weights import to_safetensors
from probe.notebook import facts, looks
from probe.storage import atomic_folder, atomic_write_bytes, require_file, require_free

_ENDINGS = {"onnx": ".onnx", "safetensors": ".safetensors", "jax": "-jax", "hub": "-hub"}
_MARKS = {"jax": FACTS, "hub": "preprocessor_config.json"}  # of a folder that --overwrite may replace


def _look(result: dict[str, Any]) -> str:
    """What was written, in a notebook."""
    return facts("exported", {**result, "class_names": len(result["class_names"])})


@looks(_look)
def export(config: ExportConfig) -> dict[str, Any]:
    """Writes a run as one ONNX or safetensors file, or as a folder for jax or Hugging Face; whole or not at all.

    Returns: {"format", "part", "out", "bytes", "class_names"}.
    Raises: ConfigError for a head that has no such form, or a package that is missing; InputError if --out is there
      already; what `bundle.load` and `Bundle.load_backbone` raise.
    """
    run = bundle.load(config.run)
    out = config.out or _beside(config.run, _ENDINGS[config.format])
    mark = _MARKS.get(config.format)
    if mark is None:
        require_file(out, overwrite=config.overwrite)
    else:
        require_free(out, replacing=mark if config.overwrite else None)
    try:
        classifier = Classifier.of(run, backbone=config.backbone, head_alone=config.part == "head")
    except InputError as err:
        if config.format == "hub":
            raise
        raise InputError(f"{err} The head alone, which takes embeddings, needs none: --part head.") from err
    if mark is None:
        content = to_onnx(classifier) if config.format == "onnx" else to_safetensors(classifier)
        atomic_write_bytes(out, content)
        num_bytes = len(content)
    else:
        files = to_stablehlo(classifier) if config.format == "jax" else to_hub(classifier)
        with atomic_folder(out, replacing=mark if config.overwrite else None) as folder:
            for name, part in files.items():
                (folder / name).write_bytes(part)
        num_bytes = sum(map(len, files.values()))
    return {
        "format": config.format,
        "part": config.part,
        "out": str(out),
        "bytes": num_bytes,
        "class_names": list(run.class_names),
    }


_HOW = {
    "onnx": "onnxruntime.InferenceSession({out!r}) gives logits and probabilities",
    "safetensors": "probe.NumpyHead.load({out!r}) classifies embeddings with NumPy alone",
    "jax": "jax.export.deserialize(...) of its classifier.stablehlo gives logits and probabilities",
    "hub": "its README.md has the script that classifies; say there what licence it has before you publish it",
}


def describe(result: dict[str, Any]) -> str:
    """The lines printed on stdout."""
    what = "head" if result["part"] == "head" else "backbone and head"
    line = f"{result['out']}: {what}, {len(result['class_names']):,} classes, {result['bytes'] / 1e6:,.1f} MB"
    return f"{line}\n{_HOW[result['format']].format(out=result['out'])}"


def _beside(run: Path, ending: str) -> Path:
    run = run.absolute()
    return run.with_name(run.name + ending)
