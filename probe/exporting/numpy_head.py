"""Classifies embeddings with an exported head, by NumPy alone: this file may be copied to where nothing else is.

head = NumpyHead.load("run.safetensors")            # of `probe export RUN --format safetensors`
probabilities = head.probabilities(embeddings)      # [B, D] of the backbone, as it gives them -> [B, C]
names = [head.class_names[i] for i in probabilities.argmax(axis=1)]
"""

import json
import os
import struct
from typing import Any, BinaryIO

import numpy as np

_LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it


class NumpyHead:
    """A head: `class_names`, and layers of (kernel [K, N], bias [N]) float32, ReLU between them."""

    def __init__(
        self,
        layers: list[tuple[np.ndarray, np.ndarray]],
        *,
        class_names: list[str],
        unit_norm: bool = False,
        multi_label: bool = False,
    ) -> None:
        self.layers = layers
        self.class_names = list(class_names)
        self.unit_norm = unit_norm
        self.multi_label = multi_label

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "NumpyHead":
        """Reads the head of a safetensors file. Raises: ValueError if it is damaged or holds none."""
        with open(path, "rb") as file:
            content = file.read(8)
            size = struct.unpack("<Q", content)[0] if len(content) == 8 else 0
            if not 2 <= size <= _LONGEST_HEADER:
                raise ValueError(f"{path}: not a safetensors file")
            try:
                header = json.loads(file.read(size))
                facts = json.loads(header.pop("__metadata__")["probe"])
                layers: list[tuple[np.ndarray, np.ndarray]] = []
                while f"head/{len(layers)}/kernel" in header:
                    kernel, bias = (header[f"head/{len(layers)}/{name}"] for name in ("kernel", "bias"))
                    layers.append((_read(file, 8 + size, kernel), _read(file, 8 + size, bias)))
                if not layers:
                    raise ValueError("no layers")
                options = {name: facts[name] for name in ("class_names", "unit_norm", "multi_label")}
            except (ValueError, KeyError, TypeError) as err:
                raise ValueError(f"{path}: damaged, or not what `probe export --format safetensors` wrote") from err
        return cls(layers, **options)

    def logits(self, embeddings: Any) -> np.ndarray:
        """[B, D] -> [B, C] float32."""
        hidden: np.ndarray = np.asarray(embeddings, np.float32)
        if self.unit_norm:
            norms = np.linalg.norm(hidden, axis=-1, keepdims=True)
            hidden = hidden / np.where(norms > 0, norms, 1)
        for index, (kernel, bias) in enumerate(self.layers):
            hidden = (np.maximum(hidden, 0) if index else hidden) @ kernel + bias
        return hidden

    def probabilities(self, embeddings: Any) -> np.ndarray:
        """[B, D] -> [B, C]: of a softmax, or of independent sigmoids where an image may have several classes."""
        logits = self.logits(embeddings)
        if self.multi_label:
            return np.asarray(np.exp(-np.logaddexp(0, -logits)))
        odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return np.asarray(odds / odds.sum(axis=-1, keepdims=True))


def _read(file: BinaryIO, start: int, entry: dict[str, Any]) -> np.ndarray:
    begin, end = entry["data_offsets"]
    if entry["dtype"] != "F32" or end - begin != 4 * int(np.prod(entry["shape"])):
        raise ValueError("not float32")
    file.seek(start + begin)
    return np.frombuffer(file.read(end - begin), "<f4").reshape(entry["shape"])
