"""Writes a trained pair of towers as a CLIPModel in Hugging Face layout, weights in float16."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer

from data.pretrain.captions import END, START, save_tokenizer
from data.pretrain.train import MEAN, PROJECTION, STD, VISION, text_config
from probe.backbones.mapping import arrays_from
from probe.backbones.vit import ViTConfig
from probe.images import Preprocessing


def export(params: Any, tokenizer: Tokenizer, folder: Path, vision: ViTConfig = VISION) -> None:
    """Writes config.json, model.safetensors, preprocessor_config.json and the tokenizer's files."""
    text = text_config(tokenizer.get_vocab_size())
    arrays = arrays_from({"params": params["vision"]}, vision) | arrays_from({"params": params["text"]}, text)
    arrays["logit_scale"] = np.asarray(params["logit_scale"], np.float32)
    halved = {name: array.astype(np.float16) for name, array in arrays.items()}
    ends = {"bos_token_id": tokenizer.token_to_id(START), "pad_token_id": tokenizer.token_to_id(END)}
    preprocessing = Preprocessing(
        resize=vision.image_size,
        resample=3,
        crop=(vision.image_size, vision.image_size),
        rescale_factor=1 / 255,
        mean=(MEAN,) * 3,
        std=(STD,) * 3,
    )
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "dtype": "float16",
        "projection_dim": PROJECTION,
        "vision_config": {"model_type": "clip_vision_model", **dataclasses.asdict(vision)},
        "text_config": {"model_type": "clip_text_model", **dataclasses.asdict(text), **ends},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(_json(config))
    (folder / "preprocessor_config.json").write_text(_json(preprocessing.to_config()))
    (folder / "model.safetensors").write_bytes(safetensors.numpy.save(halved, metadata={"format": "pt"}))
    save_tokenizer(tokenizer, folder)


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
