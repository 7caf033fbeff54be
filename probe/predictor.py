"""A saved classifier on its backbone, ready to answer: what `predict` and `serve` share."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from probe.backbones import Backbone, Precision, make_embed_fn
from probe.bundle import Bundle
from probe.heads import class_logits


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """What n images got, in their order."""

    embeddings: np.ndarray
    """[n, D] float32 of the view that the head reads."""
    probabilities: np.ndarray
    """[n, C] float32, calibrated as the saved head is; with several labels per image each stands alone."""


class Predictor:
    """Classifies preprocessed images at one batch shape: one compilation, and an image's answer does not depend, to
    the bit, on what else is in its batch. Another `batch_size` may be set: another compilation, and other bits."""

    def __init__(self, classifier: Bundle, backbone: Backbone, *, batch_size: int) -> None:
        self.classifier, self.preprocessing, self.batch_size = classifier, backbone.preprocessing, batch_size
        precision = Precision.from_json(classifier.backbone.precision)
        self._embed = make_embed_fn(backbone, (classifier.view,), precision)
        self._normalise = jax.nn.sigmoid if classifier.multi_label else jax.nn.softmax

    def __call__(self, pixels: Sequence[np.ndarray]) -> Answers:
        """1 to batch_size images [H, W, 3] uint8 -> their answers. Raises: ConfigError as `make_embed_fn` says."""
        num = len(pixels)
        batch = np.zeros((self.batch_size, *pixels[0].shape), np.uint8)
        np.stack(pixels, out=batch[:num])
        embeddings = self._embed(batch)[self.classifier.view]
        logits = self.classifier.head.apply(embeddings)
        probabilities = self._normalise(logits if self.classifier.multi_label else class_logits(logits))
        return Answers(np.asarray(embeddings)[:num], np.asarray(probabilities)[:num])

    def decide(self, probabilities: np.ndarray) -> str | list[str]:
        """[C] -> the class; with several labels per image those of one half or more."""
        names = self.classifier.class_names
        if self.classifier.multi_label:
            return [name for name, p in zip(names, probabilities, strict=True) if p >= 0.5]
        return names[int(probabilities.argmax())]
