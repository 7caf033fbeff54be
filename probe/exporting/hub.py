"""A folder in Hugging Face layout, with a model card: what `transformers` with PyTorch loads, and answers alike.

    config.json, model.safetensors   a ResNetForImageClassification, classes included; or the backbone alone
    preprocessor_config.json         how a picture becomes its input
    head.safetensors                 where the backbone is alone, the head: see `probe.exporting.weights`
    README.md                        the card: figures with intervals, data, and a script that classifies

A linear head on a ResNet is what ResNetForImageClassification has. transformers' CLIPForImageClassification averages
the patches where CLIP's pooler reads the class token: it would load our head without a word and answer wrongly. So of a
CLIP the tower is written, and the script of the card joins it with the head.
"""

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from probe import provenance
from probe.backbones import Backbone, ResNetConfig, ViTConfig
from probe.backbones.checkpoint import json_bytes, published_config, published_weights
from probe.backbones.mapping import arrays_from
from probe.exporting.classifier import Classifier
from probe.exporting.weights import to_safetensors
from probe.sources import display_name

_TEMPLATES = Path(__file__).parent / "templates"
_FIGURES = {  # of metrics.json: name in the card, and the type that the Hub knows it by
    "accuracy": ("accuracy", "accuracy"),
    "balanced_accuracy": ("balanced accuracy", "balanced_accuracy"),
    "macro_f1": ("macro F1", "f1"),
    "roc_auc": ("ROC-AUC", "roc_auc"),
    "nll": ("negative log-likelihood", "nll"),
    "expected_calibration_error": ("expected calibration error", "expected_calibration_error"),
}
_CLASSES_NAMED = 100


def to_hub(classifier: Classifier) -> dict[str, bytes]:
    """The files of the folder, by name."""
    assert classifier.backbone is not None, "a head alone has no layout"
    run = classifier.run
    backbone = _with_view(classifier.backbone, run.view)
    whole = isinstance(backbone.config, ResNetConfig) and len(classifier.head.layers) == 1
    whole = whole and not classifier.head.unit_norm
    config = published_config(backbone)
    config["id2label"] = dict(enumerate(run.class_names))
    config["label2id"] = {name: index for index, name in enumerate(run.class_names)}
    arrays = arrays_from(backbone.variables, backbone.config)
    if whole:
        (kernel, bias) = classifier.head.layers[0]
        arrays = {f"resnet.{name}": array for name, array in arrays.items()}
        arrays |= {"classifier.1.weight": np.ascontiguousarray(kernel.T), "classifier.1.bias": bias}
        config["architectures"] = ["ResNetForImageClassification"]
        config["problem_type"] = f"{'multi' if run.multi_label else 'single'}_label_classification"
    files = {
        "config.json": json_bytes({str(name): value for name, value in config.items()}),
        "preprocessor_config.json": json_bytes(run.preprocessor_config),
        "model.safetensors": published_weights(arrays),
        "README.md": _card(classifier, str(config["architectures"][0]), whole=whole),
    }
    if not whole:
        files["head.safetensors"] = to_safetensors(dataclasses.replace(classifier, backbone=None))
    return files


def _with_view(backbone: Backbone, view: str) -> Backbone:
    """Without CLIP's projection where the head does not read it."""
    if view != "pooler" or not isinstance(backbone.config, ViTConfig):
        return backbone
    params = {name: tree for name, tree in backbone.variables["params"].items() if name != "visual_projection"}
    config = dataclasses.replace(backbone.config, projection_dim=None)
    return dataclasses.replace(backbone, config=config, variables={"params": params})


def _card(classifier: Classifier, architecture: str, *, whole: bool) -> bytes:
    run = classifier.run
    metrics = json.loads((run.folder / "metrics.json").read_bytes())
    made = provenance.load(run.folder)
    splits = {name: figures for name in ("test", "val") if (figures := _figures(metrics["splits"].get(name)))}
    data = _data_name(made)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=False,  # noqa: S701  it is Markdown: `inline` escapes every name
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"inline": _inline, "yaml": _yaml}
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", run.backbone.name, re.ASCII) and run.backbone.revision
    text = environment.get_template("card.md").render(
        name=run.folder.absolute().name,
        facts=classifier.facts(),
        splits=splits,
        counts={name: figures["n"] for name, figures in metrics["splits"].items()},
        data=data,
        base_model=run.backbone.name if is_hub_id else None,
        architecture=architecture,
        whole=whole,
        num_layers=len(classifier.head.layers),
        unit_norm=classifier.head.unit_norm,
        classes=run.class_names[:_CLASSES_NAMED],
        num_classes=len(run.class_names),
        verb=_verb(metrics, finetuned=run.finetuned),
        warnings=metrics.get("warnings", []),
    )
    return text.encode(errors="replace")


def _figures(of_split: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The figures of a split that have a value, as lines of a table; the first is accuracy."""
    if not of_split or of_split["accuracy"] is None:
        return []
    return [
        {
            "name": name,
            "type": kind,
            "value": of_split[figure],
            "interval": of_split.get(f"{figure}_interval_95"),
            "n": of_split["n"],
        }
        for figure, (name, kind) in _FIGURES.items()
        if of_split.get(figure) is not None
    ]


def _data_name(made: dict[str, Any]) -> str:
    """What the images are called: the name of their folder or file, not where it lies."""
    source = (made.get("source") or {}).get("images")
    return Path(source).name if source else "images"


def _verb(metrics: dict[str, Any], *, finetuned: bool) -> str:
    if "verdict" in metrics:
        kept = "backbone and head were trained end to end" if finetuned else "the linear probe was kept"
        return f"`probe finetune`: {kept}"
    if "prompts" in metrics and "head" not in metrics:
        return "`probe zero-shot`: the head is made of the names of the classes alone"
    return f"`probe fit-linear`: a {metrics.get('head', 'linear')} head on embeddings of the backbone as it was"


def _inline(text: str) -> str:
    """A name as text that neither Markdown nor HTML reads as anything else."""
    shown = html.escape(display_name(text))
    return re.sub(r"[\\`*_\[\]()|~:@]", lambda found: f"&#{ord(found[0])};", shown)


def _yaml(value: Any) -> str:
    """A value as JSON on one line, which is YAML too."""
    return json.dumps(display_name(value) if isinstance(value, str) else value, ensure_ascii=False)
