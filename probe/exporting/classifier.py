"""What every exported form is made of: a run's head as plain layers, its backbone, and the facts that go along."""

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from probe.backbones import Backbone
from probe.bundle import Bundle
from probe.errors import ConfigError


@dataclasses.dataclass(frozen=True, eq=False)
class DenseHead:
    """A head as matrices: embeddings, divided by their norm if `unit_norm`, through the layers, ReLU between them.

    layers: (kernel [K, N], bias [N]) float32 each; the last has one column per class, also for two classes, whose first
    column is 0: its logits are those of a softmax.
    """

    unit_norm: bool
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]

    def apply(self, embeddings: Any) -> Any:
        """[B, D] -> [B, C] logits, in jax; B may be symbolic."""
        hidden = jnp.asarray(embeddings, jnp.float32)
        if self.unit_norm:
            norms = jnp.linalg.norm(hidden, axis=-1, keepdims=True)
            hidden = hidden / jnp.where(norms > 0, norms, 1)
        for index, (kernel, bias) in enumerate(self.layers):
            hidden = jnp.maximum(hidden, 0) if index else hidden
            hidden = jnp.matmul(hidden, kernel, precision="highest") + bias
        return hidden


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A run to be exported; backbone is None where the head alone is."""

    run: Bundle
    head: DenseHead
    backbone: Backbone | None

    @classmethod
    def of(cls, run: Bundle, *, backbone: str | None, head_alone: bool) -> "Classifier":
        """Reads what is needed of a run.

        Args:
          backbone: hub id or folder, where it is not where it was.
        Raises: ConfigError for a head that cannot be exported; what `Bundle.load_backbone` raises.
        """
        head = dense_head(run)
        return cls(run, head, None if head_alone else run.load_backbone(backbone))

    @property
    def num_inputs(self) -> int:
        """D, the length of the embeddings that the head reads."""
        return len(self.head.layers[0][0])

    @property
    def backbone_name(self) -> str:
        """As it may be published: of a folder its own name, not where it lies on this machine."""
        name = self.run.backbone.name
        return Path(name).name if Path(name).is_absolute() else name

    def facts(self) -> dict[str, Any]:
        """What whoever uses an exported form must know, as JSON values."""
        run = self.run
        if self.backbone is None:
            takes = f"embeddings [batch, {self.num_inputs}] float32: the backbone's {run.view} output, not normalised"
        else:
            height, width = self.backbone.preprocessing.image_size
            takes = (
                f"images [batch, {height}, {width}, 3] uint8, RGB, resized and cropped as preprocessing says; "
                "rescaling, mean and deviation are part of the model"
            )
        return {
            "class_names": list(run.class_names),
            "multi_label": run.multi_label,
            "input": takes,
            "logits": "[batch, classes] float32, " + ("of independent sigmoids" if run.multi_label else "of a softmax"),
            "probabilities": "[batch, classes] float32, as `probe predict` gives them",
            "preprocessing": run.preprocessor_config,
            "backbone": {
                "name": self.backbone_name,
                "revision": run.backbone.revision,
                "fingerprint": run.backbone.fingerprint,
                "finetuned": run.finetuned,
                "view": run.view,
            },
            "made_by": f"probe-jax {importlib.metadata.version('probe-jax')}",
        }


def dense_head(run: Bundle) -> DenseHead:
    """A run's head as plain layers. Raises: ConfigError for a vote of neighbours."""
    params = dict(run.head.params)
    if "bank" in params:
        raise ConfigError(
            f"{run.folder}: its head is a vote of the nearest training rows, and would take their embeddings along. "
            "Export a run of `probe fit-linear --head linear`, or of --head mlp."
        )
    unit_norm = params.pop("unit_norm", None) is not None
    names = [f"hidden_{index}" for index in range(len(run.head.hidden))] + ["out"]
    trees = [params[name] for name in names] if run.head.hidden else [params]
    layers = [(np.asarray(tree["kernel"], np.float32), np.asarray(tree["bias"], np.float32)) for tree in trees]
    kernel, bias = layers[-1]
    if len(bias) == 1 and len(run.class_names) == 2:
        layers[-1] = (np.pad(kernel, ((0, 0), (1, 0))), np.pad(bias, (1, 0)))
    return DenseHead(unit_norm, tuple(layers))
