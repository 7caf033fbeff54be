"""The program that `predict` runs, with its weights, as jax.export serialises it: StableHLO, for any batch size.

    classifier.stablehlo   jax.export.deserialize(bytes).call(images) -> {"logits", "probabilities"}, [B, C] float32
    classifier.json        class names, preprocessing, what goes in and comes out, and which versions made it

Other versions of jax read it for as long as jax.export's documentation says; what must last longer is better exported
as ONNX or safetensors.
"""

import json
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from probe.backbones import Precision
from probe.backbones.embedding import make_stages
from probe.exporting.classifier import Classifier

PROGRAM, FACTS = "classifier.stablehlo", "classifier.json"
PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(classifier: Classifier) -> dict[str, bytes]:
    """The files of the folder, by name; arithmetic is that of the run, so that its probabilities are `predict`'s."""
    run, backbone = classifier.run, classifier.backbone
    precision = Precision.from_json(run.backbone.precision)
    stages = [] if backbone is None else make_stages(backbone, (run.view,), precision)

    def classify(inputs: jax.Array) -> dict[str, jax.Array]:
        hidden: Any = inputs
        for stage in stages:
            hidden = stage.apply(stage.weights, hidden)
        logits = classifier.head.apply(hidden[run.view] if stages else hidden)
        normalise = jax.nn.sigmoid if run.multi_label else jax.nn.softmax
        return {"logits": logits, "probabilities": normalise(logits)}

    (batch,) = jax.export.symbolic_shape("batch")
    if backbone is None:
        given = jax.ShapeDtypeStruct((batch, classifier.num_inputs), jnp.float32)
    else:
        given = jax.ShapeDtypeStruct((batch, *backbone.preprocessing.image_size, 3), jnp.uint8)
    exported = jax.export.export(jax.jit(classify), platforms=PLATFORMS)(given)
    facts = {
        **classifier.facts(),
        "precision": precision.to_json(),
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "jax": jax.__version__,
    }
    return {PROGRAM: bytes(exported.serialize()), FACTS: json.dumps(facts, indent=2).encode() + b"\n"}
