"""What a trained model finds: the right name for a picture, among all names that there could be.

Everything is asked of the saved checkpoint, through `probe.load_backbone` and `probe.load_text_encoder`, on pictures
of emoji on white. Three questions, the hardest last:
    seen names, new design     pictures of the design that is held out; their names are known from other designs
    new names, seen designs    pictures, in the designs that it was trained on, of emoji whose names are held out
    new names, new design      both at once
For each the picture's name is looked for among the names of that question alone, and for the last two also among all.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from data.pretrain.augment import plain_image
from data.pretrain.fetch import packages
from data.pretrain.pairs import Pairs
from probe.backbones import load_backbone, load_text_encoder, make_embed_fn

_BATCH = 64
_PROMPT = "{}"


def evaluate(pairs: Pairs, checkpoint: Path) -> dict[str, Any]:
    """Retrieval figures as JSON values."""
    backbone, encoder = load_backbone(checkpoint), load_text_encoder(checkpoint)
    emoji = [index for index, concept in enumerate(pairs.concepts) if concept.kind == "emoji"]
    texts = encoder.encode([_PROMPT.replace("{}", pairs.concepts[index].name) for index in emoji])
    column = {index: position for position, index in enumerate(emoji)}
    held_out = np.array([pairs.concepts[index].held_out for index in emoji])
    designs = {package.design: package.use for package in packages("emoji", "held out")}
    uses = np.array([designs.get(design, "") for design in pairs.designs])[pairs.design_of]
    new_name = np.array([concept.held_out for concept in pairs.concepts])[pairs.concept_of]
    embed_fn = make_embed_fn(backbone, ("projected",))

    def directions(rows: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(rows), _BATCH):
            images = np.stack([plain_image(pairs.images[row]) for row in rows[start : start + _BATCH]])
            padded = np.concatenate([images, np.zeros((_BATCH - len(images), *images.shape[1:]), np.uint8)])
            parts.append(np.asarray(embed_fn(padded)["projected"])[: len(images)])
        found = np.concatenate(parts)
        return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))

    questions = {
        "seen names, new design": (uses == "held out") & ~new_name,
        "new names, seen designs": (uses == "emoji") & new_name,
        "new names, new design": (uses == "held out") & new_name,
    }
    figures: dict[str, Any] = {}
    for question, mask in questions.items():
        rows = np.flatnonzero(mask)
        cosines = directions(rows) @ texts.T
        true = np.array([column[concept] for concept in pairs.concept_of[rows]])
        asked = held_out if "new names" in question else ~held_out
        figures[question] = _ranks(np.where(asked, cosines, -np.inf), true, int(asked.sum()))
        if "new names" in question:
            figures[f"{question}, among all names"] = _ranks(cosines, true, len(emoji))
    return figures


def _ranks(cosines: np.ndarray, true: np.ndarray, num_names: int) -> dict[str, Any]:
    rank = (cosines > cosines[np.arange(len(true)), true][:, None]).sum(axis=1)
    return {
        "pictures": len(true),
        "names": num_names,
        "top_1": round(float((rank == 0).mean()), 4),
        "top_5": round(float((rank < 5).mean()), 4),
        "median_rank": int(np.median(rank)) + 1,
        "top_1_by_chance": round(1 / num_names, 4),
    }


def loss_curve(log: Path, points: int = 12) -> list[dict[str, Any]]:
    """A dozen lines of the log, evenly spread, the last one included."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    every = max(1, math.ceil(len(lines) / points))
    return lines[::-every][::-1]
