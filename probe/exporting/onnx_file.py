"""The ONNX file: one graph with its weights, its classes and its preprocessing, for any batch size."""

import importlib
import json
from typing import Any

import numpy as np

from probe.errors import ConfigError, InputError
from probe.exporting.classifier import Classifier
from probe.exporting.onnx_graph import OPSET, Graph, add_backbone, add_head

_LARGEST = 2**31 - 2**20  # bytes of a protobuf message, less a little for what is not weights
_IR_VERSION = 8  # the one that belongs to this opset


def to_onnx(classifier: Classifier) -> bytes:
    """The content of the file: images or embeddings -> logits and probabilities, float32, batch of any size.

    Facts stand in its metadata, one entry each: class_names as a JSON list, preprocessing as a
    preprocessor_config.json, and so on; numbers do not depend on the precision that the run was made with.
    Raises: ConfigError where the package onnx is not installed; InputError for more weights than a file can hold.
    """
    onnx = _import_onnx()
    run, backbone, helper = classifier.run, classifier.backbone, onnx.helper
    graph, float32 = Graph(onnx), onnx.TensorProto.FLOAT
    if backbone is None:
        taken = helper.make_tensor_value_info("embeddings", float32, ["batch", classifier.num_inputs])
        embeddings = "embeddings"
    else:
        shape = ["batch", *backbone.preprocessing.image_size, 3]
        taken = helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, shape)
        embeddings = add_backbone(graph, backbone, run.view, "images")
    logits = add_head(graph, classifier.head, embeddings)
    graph.name(logits, "logits")
    probabilities = graph("Sigmoid", logits) if run.multi_label else graph("Softmax", logits, axis=-1)
    graph.name(probabilities, "probabilities")
    num_bytes = sum(np.prod(one.dims, dtype=np.int64) * 4 for one in graph.initializers)
    if num_bytes > _LARGEST:
        raise InputError(
            f"{run.folder}: {num_bytes / 1e9:.1f} GB of weights, and an ONNX file holds 2: export --part head, or "
            "another --format"
        )
    given = [helper.make_tensor_value_info(name, float32, ["batch", len(run.class_names)]) for name in _OUTPUTS]
    facts = classifier.facts()
    model = helper.make_model(
        helper.make_graph(graph.nodes, "classifier", [taken], given, graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=_IR_VERSION,
        producer_name=facts["made_by"],
        doc_string=f"{facts['input']} -> logits and probabilities {facts['logits'].partition(',')[0]}",
    )
    helper.set_model_props(model, {name: _text(value) for name, value in facts.items()})
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


_OUTPUTS = ("logits", "probabilities")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _import_onnx() -> Any:
    try:
        importlib.import_module("onnx.checker")
        return importlib.import_module("onnx")
    except ImportError:
        raise ConfigError("--format onnx needs one more package: pip install 'probe-jax[onnx]'") from None
