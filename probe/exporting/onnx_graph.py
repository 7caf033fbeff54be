"""ONNX graphs of the inference towers and of heads, operator by operator.

They follow `probe.backbones.inference` and `probe.backbones.folded`, and take their weights as those have prepared
them: pixels go in as uint8, norms are folded into the kernels that read them, and a ViT's last block computes one
token. A converter that traces the JAX program would do as well, but the one that there is (jax2onnx 0.17) wants
orbax-checkpoint below 0.11.37 and brings a dozen packages along.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from probe.backbones import Backbone, Precision, ResNetConfig, ViTConfig
from probe.backbones.embedding import make_stages
from probe.backbones.resnet import layer_shapes
from probe.exporting.classifier import DenseHead

OPSET = 17  # of 2022: the first with LayerNormalization, and old enough for what runs models today


class Graph:
    """Nodes and their constants, as they are added.

    graph = Graph(onnx)
    doubled = graph("Mul", "images", np.float32(2))
    """

    def __init__(self, onnx: Any) -> None:
        self._onnx = onnx
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def __call__(self, operator: str, *inputs: Any, num_outputs: int = 1, **attributes: Any) -> Any:
        """Adds a node. inputs: names of values, or arrays. Returns: the name of its output, or of each of several."""
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        outputs = [f"{operator.lower()}_{len(self.nodes)}_{index}" for index in range(num_outputs)]
        self.nodes.append(self._onnx.helper.make_node(operator, names, outputs, **attributes))
        return outputs[0] if num_outputs == 1 else outputs

    def name(self, value: str, name: str) -> None:
        """Gives a value the name of an output of the whole."""
        self.nodes.append(self._onnx.helper.make_node("Identity", [value], [name]))

    def _constant(self, value: Any) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(self._onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name


def add_backbone(graph: Graph, backbone: Backbone, view: str, images: str) -> str:
    """Adds a tower: images [B, H, W, 3] uint8 -> the name of its view [B, D], float32 throughout."""
    stages = {stage.name: stage.weights for stage in make_stages(backbone, (view,), Precision())}
    if isinstance(backbone.config, ViTConfig):
        return _add_vit(graph, backbone.config, stages, images)
    return _add_resnet(graph, backbone.config, stages, images)


def add_head(graph: Graph, head: DenseHead, embeddings: str) -> str:
    """Adds a head: [B, D] -> the name of its logits [B, C]."""
    hidden = embeddings
    if head.unit_norm:
        norms = graph("ReduceL2", hidden, axes=[-1], keepdims=1)
        hidden = graph("Div", hidden, graph("Where", graph("Greater", norms, np.float32(0)), norms, np.float32(1)))
    for index, (kernel, bias) in enumerate(head.layers):
        hidden = graph("Relu", hidden) if index else hidden
        hidden = graph("Gemm", hidden, kernel, bias)
    return hidden


def _add_vit(graph: Graph, config: ViTConfig, stages: dict[str, Any], images: str) -> str:
    *blocks, last = [f"layers_{index}" for index in range(config.num_hidden_layers)]
    hidden = _add_patches(graph, config, stages["embeddings"], images)
    for name in blocks:
        weights = stages[name]
        normed = _standardise(graph, config, hidden)
        query, key, value = _split_heads(graph, config, _dense(graph, normed, weights["qkv"]), 3)
        hidden = _rest_of_block(graph, config, weights, hidden, _attend(graph, config, query, key, value))
    weights = stages[last]
    normed = _standardise(graph, config, hidden)
    key, value = _split_heads(graph, config, _dense(graph, normed, weights["kv"]), 2)
    first = np.array([0], np.int64)
    (query,) = _split_heads(graph, config, _dense(graph, graph("Gather", normed, first, axis=1), weights["q"]), 1)
    token = graph("Gather", hidden, first, axis=1)
    token = _rest_of_block(graph, config, weights, token, _attend(graph, config, query, key, value))
    token = graph("Reshape", token, np.array([-1, config.hidden_size], np.int64))
    pooler = stages["pooler"]
    pooled = _standardise(graph, config, token, pooler["norm"])
    return _dense(graph, pooled, pooler["projection"], bias=False) if "projection" in pooler else pooled


def _add_patches(graph: Graph, config: ViTConfig, weights: dict[str, Any], images: str) -> str:
    """[B, H, W, 3] uint8 -> [B, T, D], what enters the first block."""
    size, side, width = config.patch_size, config.image_size // config.patch_size, config.hidden_size
    pixels = graph("Sub", graph("Cast", images, to=1), np.float32(128))  # as `inference` centres them; 1 is float32
    if side * size < config.image_size:
        starts, ends, axes = (np.array(pair, np.int64) for pair in ((0, 0), (side * size, side * size), (1, 2)))
        pixels = graph("Slice", pixels, starts, ends, axes)
    squares = graph("Reshape", pixels, np.array([-1, side, size, side, size, config.num_channels], np.int64))
    squares = graph("Transpose", squares, perm=[0, 1, 3, 2, 4, 5])
    patches = graph("Reshape", squares, np.array([-1, side * side, size * size * config.num_channels], np.int64))
    hidden = graph("Add", _dense(graph, patches, weights["patch"], bias=False), weights["positions"])
    hidden = _standardise(graph, config, hidden, weights["norm"])
    batch = graph("Shape", images, start=0, end=1)
    shape = graph("Concat", batch, np.array([1, width], np.int64), axis=0)
    return str(graph("Concat", graph("Expand", weights["class_token"], shape), hidden, axis=1))


def _dense(graph: Graph, inputs: str, kernel: Any, *, bias: bool = True) -> str:
    products = graph("MatMul", inputs, kernel.values)
    return str(graph("Add", products, kernel.bias) if bias else products)


def _standardise(graph: Graph, config: ViTConfig, tokens: str, norm: dict[str, Any] | None = None) -> str:
    """A layer norm; without `norm` its gain and bias are in the kernel that reads it."""
    ones = np.ones(config.hidden_size, np.float32)
    gain, bias = (ones, 0 * ones) if norm is None else (norm["scale"], norm["bias"])
    return str(graph("LayerNormalization", tokens, gain, bias, axis=-1, epsilon=config.layer_norm_eps))


def _split_heads(graph: Graph, config: ViTConfig, projected: str, num: int) -> list[str]:
    """[B, T, num · D] -> `num` of [B, heads, T, d]."""
    heads = config.num_attention_heads
    shape = np.array([0, 0, num * heads, config.hidden_size // heads], np.int64)  # 0: as it is
    by_head = graph("Transpose", graph("Reshape", projected, shape), perm=[0, 2, 1, 3])
    parts = graph("Split", by_head, np.full(num, heads, np.int64), num_outputs=num, axis=1) if num > 1 else by_head
    return [parts] if num == 1 else list(parts)


def _attend(graph: Graph, config: ViTConfig, query: str, key: str, value: str) -> str:
    """[B, heads, Q, d], [B, heads, T, d] twice -> [B, Q, D]; the scores' scale is in the queries."""
    scores = graph("MatMul", query, graph("Transpose", key, perm=[0, 1, 3, 2]))
    mixed = graph("MatMul", graph("Softmax", scores, axis=-1), value)
    mixed = graph("Transpose", mixed, perm=[0, 2, 1, 3])
    return str(graph("Reshape", mixed, np.array([0, 0, config.hidden_size], np.int64)))


def _rest_of_block(graph: Graph, config: ViTConfig, weights: dict[str, Any], hidden: str, mixed: str) -> str:
    hidden = graph("Add", hidden, _dense(graph, mixed, weights["out"]))
    inner = _dense(graph, _standardise(graph, config, hidden), weights["fc1"])
    return str(graph("Add", hidden, _dense(graph, _activate(graph, config.hidden_act, inner), weights["fc2"])))


def _activate(graph: Graph, name: str, x: str) -> str:
    match name:
        case "relu":
            return str(graph("Relu", x))
        case "silu":
            return str(graph("Mul", x, graph("Sigmoid", x)))
        case "quick_gelu":
            return str(graph("Mul", x, graph("Sigmoid", graph("Mul", x, np.float32(1.702)))))
        case "gelu":
            normal = graph("Add", graph("Erf", graph("Mul", x, np.float32(0.5**0.5))), np.float32(1))
            return str(graph("Mul", graph("Mul", x, normal), np.float32(0.5)))
    raise AssertionError(f"no operator for {name}")


def _add_resnet(graph: Graph, config: ResNetConfig, stages: dict[str, Any], images: str) -> str:
    stem = stages["embedder"]
    pixels = graph("Sub", graph("Cast", images, to=1), stem["mean"])
    hidden = _convolve(graph, graph("Transpose", pixels, perm=[0, 3, 1, 2]), stem["convolution"], 2)
    hidden = _activate(graph, config.hidden_act, hidden)
    hidden = graph("MaxPool", hidden, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    for index, (features, depth) in enumerate(zip(config.hidden_sizes, config.depths, strict=True)):
        for layer in range(depth):
            weights = stages[f"stages_{index}/layers_{layer}"]
            halves = layer == 0 and (index > 0 or config.downsample_in_first_stage)
            shapes = layer_shapes(config, features, 2 if halves else 1)
            hidden = _residual_layer(graph, config, weights, hidden, [stride for _, _, stride in shapes])
    return str(graph("ReduceMean", hidden, axes=[2, 3], keepdims=0))


def _residual_layer(
    graph: Graph, config: ResNetConfig, weights: dict[str, Any], hidden: str, strides: Sequence[int]
) -> str:
    stride = int(np.prod(strides))
    residual = _convolve(graph, hidden, weights["shortcut"], stride) if "shortcut" in weights else hidden
    for index, step in enumerate(strides):
        hidden = graph("Relu", hidden) if index else hidden
        hidden = _convolve(graph, hidden, weights[f"layer_{index}"], step)
    return _activate(graph, config.hidden_act, graph("Add", hidden, residual))


def _convolve(graph: Graph, hidden: str, weights: dict[str, Any], stride: int) -> str:
    """[B, in, H, W] -> [B, out, ceil(H / stride), ceil(W / stride)]."""
    kernel = weights["kernel"].transpose(3, 2, 0, 1)
    padding = kernel.shape[2] // 2
    return str(graph("Conv", hidden, kernel, weights["bias"], strides=[stride] * 2, pads=[padding] * 4))
