"""The tiny towers that parity is tested on: between them they set every switch of both configs both ways."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

TOWERS = Path(__file__).parent / "towers"
FLAX = Path(__file__).parent / "flax"
SHARED_GOLDEN = Path(__file__).parent / "resnet50_thin.npz"


@dataclasses.dataclass(frozen=True)
class Case:
    """One model of transformers: its classes, its config, and the (height, width) of its images."""

    name: str
    architecture: str
    config_class: str
    config: dict[str, Any]
    input_size: tuple[int, int]


_VISION_QUICK_GELU = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
}
_TEXT = {
    "hidden_size": 12,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
    "max_position_embeddings": 6,
}
_CLIP = {"vision_config": _VISION_QUICK_GELU, "text_config": _TEXT, "projection_dim": 6}
_VISION_GELU = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 18,  # no multiple of the patch: a border of 2 pixels is not seen
    "patch_size": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-2,
    "projection_dim": 10,
}
_VISION_ONE_PATCH = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 8,
    "patch_size": 8,
    "hidden_act": "relu",
    "attention_dropout": 0.5,  # in training only
}
_BOTTLENECK = {"layer_type": "bottleneck", "embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2]}
_BASIC = {"layer_type": "basic", "embedding_size": 6, "hidden_sizes": [6, 10, 12], "depths": [2, 1, 1]}

CASES = (
    Case("clip", "CLIPModel", "CLIPConfig", _CLIP, (16, 16)),
    Case("clip-projection", "CLIPVisionModelWithProjection", "CLIPVisionConfig", _VISION_GELU, (18, 18)),
    Case("clip-vision", "CLIPVisionModel", "CLIPVisionConfig", _VISION_ONE_PATCH, (8, 8)),
    Case("resnet-bottleneck", "ResNetForImageClassification", "ResNetConfig", _BOTTLENECK, (24, 24)),
    Case(
        "resnet-bottleneck-early",  # the original's stride in the first convolution, and odd sizes all the way
        "ResNetModel",
        "ResNetConfig",
        _BOTTLENECK | {"downsample_in_bottleneck": True, "downsample_in_first_stage": True, "hidden_act": "gelu"},
        (21, 30),
    ),
    Case("resnet-basic", "ResNetModel", "ResNetConfig", _BASIC, (17, 24)),
    Case(
        "resnet-basic-early",
        "ResNetModel",
        "ResNetConfig",
        _BASIC | {"downsample_in_first_stage": True, "hidden_act": "silu"},
        (36, 36),
    ),
)

TEXTS = Path(__file__).parent / "texts"
TEXT_CASES = (
    Case(
        "clip-legacy",  # its config says that texts end at token 2, so the highest id ends them
        "CLIPModel",
        "CLIPConfig",
        _CLIP | {"text_config": _TEXT | {"eos_token_id": 2, "pad_token_id": 0}},
        (16, 16),
    ),
    Case(
        "clip-text",
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        {
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 30,
            "max_position_embeddings": 8,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-2,
            "projection_dim": 10,
            "bos_token_id": 28,
            "eos_token_id": 11,  # not the highest id
            "pad_token_id": 11,
        },
        (16, 16),
    ),
)


def synthetic_images() -> np.ndarray:
    """[2, 224, 224, 3] uint8: coloured squares of 16 and of 4 pixels, for towers with real weights."""
    rng = np.random.default_rng(0)
    coarse, fine = (rng.integers(0, 256, (224 // size, 224 // size, 3), np.uint8) for size in (16, 4))
    return np.stack([np.kron(coarse, np.ones((16, 16, 1), np.uint8)), np.kron(fine, np.ones((4, 4, 1), np.uint8))])
