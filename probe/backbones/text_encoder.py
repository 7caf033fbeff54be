"""A checkpoint's text side: texts -> their places in the space that CLIP shares between images and texts."""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from probe.backbones.checkpoint import CONFIG, known_fields, locate, read_json, read_weights
from probe.backbones.mapping import has_projection, variables_from
from probe.backbones.text import TextConfig, TextTower
from probe.errors import InputError

_BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """A pretrained text tower with its tokenizer.

    name, revision: as of a `Backbone`.
    folder: where the checkpoint's files are, the tokenizer's among them.
    config: what the tower is built from; it has a projection.
    variables: {"params": nested dicts of float32 arrays}.
    logit_scale: what the model multiplies a cosine by to get a logit (CLIP's exp(logit_scale)).
    """

    name: str
    revision: str | None
    folder: Path
    config: TextConfig
    variables: dict[str, Any]
    logit_scale: float

    @functools.cached_property
    def module(self) -> TextTower:
        """The linen module: `module.apply(variables, tokens) -> TextOutput`."""
        return TextTower(self.config)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent, which is no fault
        import transformers  # seconds to import, and only texts need it

        try:
            return transformers.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as err:  # of the library and of those below it: they have no common ground
            raise InputError(f"{self.folder}: its tokenizer cannot be read: {err}") from err

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """[N, T] int32, each text padded or cut to the T tokens that the tower has positions for.

        Raises: InputError if the checkpoint has no tokenizer that can be read, or it is another model's.
        """
        length = self.config.max_position_embeddings
        if not texts:
            return np.zeros((0, length), np.int32)
        tokens = self._tokenizer(list(texts), padding="max_length", truncation=True, max_length=length)["input_ids"]
        tokens = np.asarray(tokens, np.int32)
        if tokens.size and tokens.max() >= self.config.vocab_size:
            raise InputError(
                f"{self.folder}: the tokenizer gives token {tokens.max()}, but {CONFIG} has a vocabulary of "
                f"{self.config.vocab_size}; they belong to different models"
            )
        return tokens

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """[N, P] float32, each text's projection scaled to unit length."""
        tokens = self.tokenize(texts)
        rows = [self._embed(tokens[start : start + _BATCH_SIZE]) for start in range(0, len(tokens), _BATCH_SIZE)]
        projected = np.concatenate(rows) if rows else np.zeros((0, self.config.projection_dim or 0), np.float32)
        return np.asarray(projected / np.linalg.norm(projected, axis=1, keepdims=True))

    def _embed(self, tokens: np.ndarray) -> np.ndarray:
        padded = np.concatenate([tokens, np.repeat(tokens[-1:], _BATCH_SIZE - len(tokens), axis=0)])
        return np.asarray(self._embed_fn(self.variables, padded))[: len(tokens)]

    @functools.cached_property
    def _embed_fn(self) -> Any:
        def embed_fn(variables: dict[str, Any], tokens: jax.Array) -> Any:
            with jax.default_matmul_precision("highest"):
                output: Any = self.module.apply(variables, tokens)
            return output.projected

        return jax.jit(embed_fn)


def load_text_encoder(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> TextEncoder:
    """Loads the text side of a CLIP checkpoint.

    Args: as of `load_backbone`.
    Raises: InputError if there is no such checkpoint, it has no text tower with a projection, or its weights do not
      fit its config (all that is wrong listed at once).
    """
    name, folder, commit = locate(name_or_path, revision, with_tokenizer=True)
    raw = read_json(folder / CONFIG, "it is not a checkpoint in Hugging Face layout")
    arrays = read_weights(folder)
    try:
        config = parse_text_config(raw)
        if not has_projection(arrays, "text_projection"):
            raise InputError("the checkpoint has no text tower with a projection; give that of a whole CLIPModel")
    except InputError as err:
        raise InputError(f"{folder / CONFIG}: {err}") from err
    try:
        variables = variables_from(arrays, config)
    except InputError as err:
        raise InputError(f"{folder}: {err}") from err
    scale = np.asarray(arrays["logit_scale"], np.float32) if "logit_scale" in arrays else np.float32(np.log(1 / 0.07))
    if scale.size != 1 or not math.isfinite(float(scale.reshape(()))):
        raise InputError(f"{folder}: logit_scale must be one finite number, got {scale}")
    return TextEncoder(name, commit, folder, config, variables, math.exp(float(scale.reshape(()))))


def parse_text_config(raw: Mapping[str, Any]) -> TextConfig:
    """Reads the text side of a config.json, of a CLIPModel or of a CLIPTextModelWithProjection.

    Raises: InputError for another model_type, and for fields that no tower can be built from.
    """
    kind = raw.get("model_type")
    if kind not in ("clip", "clip_text_model"):
        raise InputError(f"model_type is {kind!r}; only clip and clip_text_model have texts that are known here")
    text = raw if kind == "clip_text_model" else raw.get("text_config_dict") or raw.get("text_config") or {}
    if not isinstance(text, Mapping):
        raise InputError(f"text_config must be an object, got {text!r}")
    fields = known_fields(TextConfig, text)
    if kind == "clip":
        fields["projection_dim"] = raw.get("projection_dim", TextConfig.projection_dim)  # CLIPModel reads its own
    return TextConfig(**fields)
