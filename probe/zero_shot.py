"""`probe zero-shot`: a classifier out of words alone, and how good it is where images have labels.

Nothing is fitted and nothing chosen, so every labelled row may judge it. What it saves is a run like those of
`fit-linear`: `predict` classifies with it and `compare` sets it beside a probe on the same rows.
"""

from typing import Any

import numpy as np

from probe import bundle, provenance
from probe.backbones import Backbone, load_backbone, load_text_encoder, make_embed_fn
from probe.config import ZeroShotConfig, to_json
from probe.errors import ConfigError, InputError
from probe.evaluation import predictions
from probe.evaluation.metrics import describe_splits, summarize
from probe.heads import TrainedHead, class_logits
from probe.notebook import looks, metrics_look
from probe.probing.prompts import class_directions, zero_shot_head
from probe.progress import Progress, heeds_quiet, say
from probe.reporting import components
from probe.sources import check_labels, display_name, open_source
from probe.sources.origin import describe_origin
from probe.training.decoded import ImageRows

VIEW = "projected"
_FAILURES_SHOWN = 20


@looks(metrics_look)
@heeds_quiet
def zero_shot(config: ZeroShotConfig) -> dict[str, Any]:
    """Makes a classifier of the classes' names and judges it on every labelled image, split by split.

    Returns: what metrics.json holds: the figures of each split ("all" where none are named), prompts, logit scale,
      and the images left out.
    Raises: InputError for images without labels, a checkpoint without a text tower or its tokenizer; ConfigError for
      several labels an image.
    """
    made = provenance.Made()
    if config.out is not None:
        bundle.require_free(config.out, overwrite=config.overwrite)
    source = open_source(config.images)
    check_labels(source)
    if source.multi_label:
        raise ConfigError(f"{config.images}: zero-shot tells classes apart, and these images have several labels")
    backbone, encoder = load_backbone(config.backbone), load_text_encoder(config.backbone)
    if VIEW not in backbone.views:
        raise InputError(f"{backbone.name}: it has no projection of images, so no space shared with texts")
    names = source.class_names
    head = zero_shot_head(class_directions(encoder, names, config.prompts), encoder.logit_scale)
    images = ImageRows.decode(source, backbone.preprocessing, num_workers=config.num_workers, on_error=config.on_error)
    logits, embeddings = _answer(backbone, head, images, config.batch_size)
    rows = {split: np.flatnonzero(_splits(images) == split) for split in ("train", "val", "test", "all")}
    answers = {split: (of, logits[of]) for split, of in rows.items() if len(of)}
    metrics = {
        "splits": {split: summarize(found, images.labels[of], names) for split, (of, found) in answers.items()},
        "prompts": list(config.prompts),
        "logit_scale": encoder.logit_scale,
        "failures": images.failures,
    }
    if config.out is not None:
        _save(config, backbone, head, images, answers, embeddings, metrics, made)
    return metrics


def describe(metrics: dict[str, Any]) -> str:
    """The lines printed on stdout."""
    lines = [
        f"left out: {display_name(failure['path'])}: {failure['detail']} ({failure['reason']})"
        for failure in metrics["failures"][:_FAILURES_SHOWN]
    ]
    splits = metrics["splits"]
    if "all" in splits:
        splits = {"test": splits["all"]}
        return "\n".join([*lines, *[line.replace("test ", "all  ") for line in describe_splits(splits)[-1:]]])
    return "\n".join([*lines, *describe_splits(splits)])


def _splits(images: ImageRows) -> np.ndarray:
    """[N]: the splits that are named, "" counting as train; "all" where none is."""
    if not (images.splits != "").any():
        return np.full(len(images.splits), "all")
    return np.where(images.splits == "", "train", images.splits)


def _answer(backbone: Backbone, head: TrainedHead, images: ImageRows, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, C] logits, and [N, P] embeddings."""
    embed_fn = make_embed_fn(backbone, (VIEW,))
    logits, embeddings = [], []
    with Progress("classifying", total=len(images.keys), unit="images") as progress:
        for batch in images.batches(np.arange(len(images.keys)), batch_size):
            num = int(batch.mask.sum())
            of_batch = embed_fn(batch.inputs)[VIEW]
            logits.append(np.asarray(class_logits(head.apply(of_batch)))[:num])
            embeddings.append(np.asarray(of_batch)[:num])
            progress.advance(num)
    return np.concatenate(logits), np.concatenate(embeddings)


def _save(
    config: ZeroShotConfig,
    backbone: Backbone,
    head: TrainedHead,
    images: ImageRows,
    answers: dict[str, tuple[np.ndarray, np.ndarray]],
    embeddings: np.ndarray,
    metrics: dict[str, Any],
    made: provenance.Made,
) -> None:
    assert config.out is not None
    named = {"test" if split == "all" else split: answer for split, answer in answers.items()}
    kept = predictions.collect(
        named,
        class_names=images.source.class_names,
        names=[example.name for example in images.examples],
        keys=images.keys,
        labels=images.labels,
    )
    reference = bundle.BackboneReference(
        name=backbone.name, revision=backbone.revision, fingerprint=backbone.fingerprint
    )
    bundle.save(
        config.out,
        head=head,
        class_names=images.source.class_names,
        view=VIEW,
        backbone=reference,
        preprocessor_config=backbone.preprocessing.to_config(),
        config=to_json(config),
        metrics=metrics,
        files={
            predictions.FILE_NAME: predictions.to_bytes(kept),
            provenance.FILE_NAME: made.to_bytes(source=describe_origin(config.images)),
            **components.of_answers(kept, lambda split: embeddings[named[split][0]]),
        },
        overwrite=config.overwrite,
    )
    say(f"saved in {config.out}: classify with `probe predict {config.out} IMAGES`")
