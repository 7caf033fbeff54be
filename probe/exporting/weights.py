"""Weights as one safetensors file: the head's layers, and the backbone's arrays under their published names.

    head/<i>/kernel [K, N], head/<i>/bias [N]   float32; ReLU stands between layers, the last has a column per class
    backbone/<name>                             as transformers' PyTorch classes name and lay them out
    metadata                                    facts as JSON under "probe"; "unit_norm" says whether embeddings are
                                                divided by their norm first

`probe.exporting.numpy_head` classifies with the head of such a file, and needs NumPy alone.
"""

import json

import numpy as np
import safetensors.numpy

from probe.backbones.mapping import arrays_from
from probe.exporting.classifier import Classifier


def to_safetensors(classifier: Classifier) -> bytes:
    """The content of the file."""
    arrays: dict[str, np.ndarray] = {}
    for index, (kernel, bias) in enumerate(classifier.head.layers):
        arrays |= {f"head/{index}/kernel": np.ascontiguousarray(kernel), f"head/{index}/bias": bias}
    facts = {**classifier.facts(), "unit_norm": classifier.head.unit_norm}
    if (backbone := classifier.backbone) is not None:
        published = arrays_from(backbone.variables, backbone.config)
        arrays |= {f"backbone/{name}": array for name, array in published.items()}
    return bytes(safetensors.numpy.save(arrays, metadata={"format": "pt", "probe": json.dumps(facts)}))
