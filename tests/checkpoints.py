"""Tiny checkpoints in Hugging Face layout with random weights, written name by name as transformers saves them.

They are made without this package's own code, so that a test which loads one checks the names too.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CLIP_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 16},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
}


def write_tiny_clip(folder: Path, *, seed: int = 0, image_size: int = 16) -> Path:
    """A CLIPVisionModelWithProjection: 2 layers, width 16, 2 heads, patches of 8, projection to 8."""
    width, mlp, layers, patch, projection = 16, 32, 2, 8, 8
    rng = np.random.default_rng(seed)

    def weight(*shape: int) -> np.ndarray:
        fan_in = int(np.prod(shape[1:])) or 1
        return (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)

    def norm(prefix: str) -> dict[str, np.ndarray]:
        scale = 1 + 0.1 * rng.standard_normal(width)
        return {f"{prefix}.weight": scale.astype(np.float32), f"{prefix}.bias": 0.1 * weight(width, 1)[:, 0]}

    def dense(prefix: str, out: int, inputs: int) -> dict[str, np.ndarray]:
        return {f"{prefix}.weight": weight(out, inputs), f"{prefix}.bias": 0.1 * weight(out, 1)[:, 0]}

    tensors = {
        "vision_model.embeddings.class_embedding": 0.1 * weight(width, 1)[:, 0],
        "vision_model.embeddings.patch_embedding.weight": weight(width, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": 0.1 * weight(1 + (image_size // patch) ** 2, width),
        "visual_projection.weight": weight(projection, width),
        **norm("vision_model.pre_layrnorm"),
        **norm("vision_model.post_layernorm"),
    }
    for layer in range(layers):
        block = f"vision_model.encoder.layers.{layer}"
        tensors |= norm(f"{block}.layer_norm1") | norm(f"{block}.layer_norm2")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= dense(f"{block}.self_attn.{name}", width, width)
        tensors |= dense(f"{block}.mlp.fc1", mlp, width) | dense(f"{block}.mlp.fc2", width, mlp)
    config = {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_channels": 3,
        "image_size": image_size,
        "patch_size": patch,
        "projection_dim": projection,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
    }
    size = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    return _write(folder, config, tensors, CLIP_PREPROCESSOR | size)


def write_tiny_resnet(folder: Path, *, seed: int = 0) -> Path:
    """A ResNetModel: two bottleneck stages of one and two layers, width 16, images of 32 pixels."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    embedding, widths, depths, reduction = 4, (8, 16), (1, 2), 4

    def conv_layer(prefix: str, out: int, inputs: int, kernel: int) -> None:
        fan_in = inputs * kernel * kernel
        weight = rng.standard_normal((out, inputs, kernel, kernel)) * np.sqrt(2 / fan_in)
        tensors[f"{prefix}.convolution.weight"] = weight.astype(np.float32)
        tensors[f"{prefix}.normalization.weight"] = (1 + 0.1 * rng.standard_normal(out)).astype(np.float32)
        tensors[f"{prefix}.normalization.bias"] = (0.1 * rng.standard_normal(out)).astype(np.float32)
        tensors[f"{prefix}.normalization.running_mean"] = (0.1 * rng.standard_normal(out)).astype(np.float32)
        tensors[f"{prefix}.normalization.running_var"] = (1 + 0.1 * rng.random(out)).astype(np.float32)
        tensors[f"{prefix}.normalization.num_batches_tracked"] = np.asarray(1, np.int64)

    conv_layer("embedder.embedder", embedding, 3, 7)
    inputs = embedding
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for layer in range(depth):
            block = f"encoder.stages.{stage}.layers.{layer}"
            if layer == 0:
                conv_layer(f"{block}.shortcut", width, inputs, 1)
            conv_layer(f"{block}.layer.0", width // reduction, inputs, 1)
            conv_layer(f"{block}.layer.1", width // reduction, width // reduction, 3)
            conv_layer(f"{block}.layer.2", width, width // reduction, 1)
            inputs = width
    config = {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": embedding,
        "hidden_sizes": list(widths),
        "depths": list(depths),
        "layer_type": "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": True,
    }
    size = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    return _write(folder, config, tensors, CLIP_PREPROCESSOR | size)


def _write(folder: Path, config: dict, tensors: dict[str, np.ndarray], preprocessor: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
