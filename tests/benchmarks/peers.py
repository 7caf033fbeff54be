"""What others run CLIP's vision tower with: transformers on PyTorch, and ONNX Runtime; whoever is absent is named.

Every program reads the same checkpoint folder and the same pixels, normalised [B, 3, H, W] float32, uses as many
threads, and returns the pooler output [B, D]. PyTorch runs on the kind of device that jax has, or not at all.
"""

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from probe.backbones import Backbone

Run = Callable[[np.ndarray], np.ndarray]
THREADS = len(os.sched_getaffinity(0))  # as many as XLA takes
PEERS = {
    "torch": "float32",
    "torch.compile": "float32",
    "torch bfloat16": "bfloat16",
    "torch.compile bfloat16": "bfloat16",
    "onnxruntime": "float32",
    "onnxruntime int8": "int8",
}


class AbsentError(Exception):
    """A peer that is not here, or not for the device that jax has."""


def make_peer(name: str, folder: Path, backbone: Backbone) -> Run:
    """The program of that name on the checkpoint in `folder`. Raises: AbsentError, which says why."""
    try:
        return _make_torch(name, folder) if name.startswith("torch") else _make_onnx(name, backbone)
    except ImportError as err:
        raise AbsentError(str(err)) from err


def describe_peers() -> str:
    """Versions, devices and threads, as the programs themselves tell them."""
    told = []
    with contextlib.suppress(ImportError, AbsentError):
        import torch

        device = _torch_device()
        torch.set_num_threads(THREADS)
        told.append(f"PyTorch {torch.__version__} on {device}, {torch.get_num_threads()} threads")
    with contextlib.suppress(ImportError):
        import onnxruntime

        if jax.default_backend() == "cpu":
            told.append(f"ONNX Runtime {onnxruntime.__version__} on cpu, {THREADS} threads")
    return "; ".join(told) or "none"


def _torch_device() -> str:
    """Raises: AbsentError where PyTorch cannot use what jax uses: a GPU is not compared with a CPU."""
    import torch

    platform = jax.default_backend()
    if platform == "cpu":
        return "cpu"
    if platform == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise AbsentError(f"ours runs on a {platform.upper()}, which this PyTorch cannot use")


def _make_torch(name: str, folder: Path) -> Run:
    import torch
    import transformers

    device = _torch_device()
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
    model = transformers.CLIPVisionModel.from_pretrained(folder, dtype=dtype).eval().to(device)
    forward = torch.compile(model, dynamic=False) if "compile" in name else model

    def run(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            rounded = torch.from_numpy(pixels).to(device, dtype)
            return forward(pixel_values=rounded).pooler_output.float().cpu().numpy()

    return run


def _make_onnx(name: str, backbone: Backbone) -> Run:
    if jax.default_backend() != "cpu":
        raise AbsentError(f"ours runs on a {jax.default_backend().upper()}, and ONNX Runtime is compared on CPUs alone")
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    onnxruntime.set_default_logger_severity(3)
    logging.getLogger().setLevel(logging.ERROR)  # quantize_dynamic would have the graph prepared by another tool
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tower.onnx")
        _write_onnx(backbone, path)
        if name.endswith("int8"):
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                quantize_dynamic(path, path.with_name("int8.onnx"), weight_type=QuantType.QInt8)
            path = path.with_name("int8.onnx")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixels": pixels})[0]


def _write_onnx(backbone: Backbone, path: Path) -> None:
    """The tower as ONNX operators, one for one as PyTorch's exporter writes them (opset 17 has LayerNormalization)."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    config, params = backbone.config, backbone.variables["params"]
    width, heads = config.hidden_size, config.num_attention_heads
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(value: Any, dtype: Any = np.float32) -> str:
        constants.append(numpy_helper.from_array(np.array(value, dtype, order="C"), f"c{len(constants)}"))
        return str(constants[-1].name)

    def node(operator: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, list(inputs), [f"v{len(nodes)}"], **attributes))
        return str(nodes[-1].output[0])

    def norm(x: str, weights: dict[str, Any]) -> str:
        scale, bias = constant(weights["scale"]), constant(weights["bias"])
        return node("LayerNormalization", x, scale, bias, axis=-1, epsilon=config.layer_norm_eps)

    def dense(x: str, weights: dict[str, Any]) -> str:
        return node("Add", node("MatMul", x, constant(weights["kernel"])), constant(weights["bias"]))

    def split_heads(x: str, *order: int) -> str:
        shaped = node("Reshape", x, constant([0, 0, heads, width // heads], np.int64))
        return node("Transpose", shaped, perm=list(order))

    embeddings = params["embeddings"]
    kernel = np.transpose(np.asarray(embeddings["patch_embedding"]["kernel"]), (3, 2, 0, 1))
    patches = node("Conv", "pixels", constant(kernel), strides=[config.patch_size] * 2)
    patches = node("Reshape", patches, constant([0, width, -1], np.int64))
    patches = node("Transpose", patches, perm=[0, 2, 1])
    batch = node("Slice", node("Shape", "pixels"), constant([0], np.int64), constant([1], np.int64))
    first = constant(np.asarray(embeddings["class_embedding"]).reshape(1, 1, width))
    first = node("Expand", first, node("Concat", batch, constant([1, width], np.int64), axis=0))
    x = node("Concat", first, patches, axis=1)
    x = node("Add", x, constant(np.asarray(embeddings["position_embedding"]).reshape(1, -1, width)))
    x = norm(x, params["pre_layernorm"])
    for layer in range(config.num_hidden_layers):
        block = params["encoder"][f"layers_{layer}"]
        attention, hidden = block["self_attn"], norm(x, block["layer_norm1"])
        query, key, value = (dense(hidden, attention[part]) for part in ("q_proj", "k_proj", "v_proj"))
        query = node("Mul", query, constant((width // heads) ** -0.5))
        scores = node("MatMul", split_heads(query, 0, 2, 1, 3), split_heads(key, 0, 2, 3, 1))
        mixed = node("MatMul", node("Softmax", scores, axis=-1), split_heads(value, 0, 2, 1, 3))
        mixed = node("Reshape", node("Transpose", mixed, perm=[0, 2, 1, 3]), constant([0, 0, width], np.int64))
        x = node("Add", x, dense(mixed, attention["out_proj"]))
        hidden = dense(norm(x, block["layer_norm2"]), block["mlp"]["fc1"])
        hidden = node("Mul", hidden, node("Sigmoid", node("Mul", hidden, constant(1.702))))
        x = node("Add", x, dense(hidden, block["mlp"]["fc2"]))
    x = norm(node("Gather", x, constant(0, np.int64), axis=1), params["post_layernorm"])
    size = config.image_size
    graph = helper.make_graph(
        nodes,
        "tower",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", width])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
