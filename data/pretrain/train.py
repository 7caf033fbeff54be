"""The contrastive training: two towers, one temperature, cross-entropy both ways (Radford et al. 2021).

For speed on a CPU the dense layers multiply in bfloat16 with float32 sums. The learning rate stands still between its
rise and its fall, so that a run can be made longer after the fact.
"""

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization
from tokenizers import Tokenizer

from data.pretrain.augment import SIZE, training_image
from data.pretrain.captions import MAX_TOKENS, VOCAB_SIZE, caption, tokenize
from data.pretrain.pairs import Pairs
from probe.backbones.products import dense
from probe.backbones.text import TextConfig, TextTower
from probe.backbones.vit import VisionTower, ViTConfig

PROJECTION = 128
VISION = ViTConfig(
    hidden_size=160,
    intermediate_size=640,
    projection_dim=PROJECTION,
    num_hidden_layers=4,
    num_attention_heads=5,
    image_size=SIZE,
    patch_size=8,
)
MEAN, STD = 0.5, 0.5  # of the pixels on the 0..1 scale
MAX_SCALE = np.log(100)  # of the logits, as in CLIP


def text_config(vocab_size: int = VOCAB_SIZE) -> TextConfig:
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=512,
        projection_dim=PROJECTION,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        eos_token_id=vocab_size - 1,
    )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long and how fast to train. All of it may differ when a run is continued."""

    num_steps: int = 20_000
    decay_steps: int = 2_000  # the last ones, in which the rate falls to 0
    warmup_steps: int = 100
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    emoji_per_batch: int = 112
    icons_per_batch: int = 16
    glyphs_per_batch: int = 16
    seed: int = 0

    @property
    def batch_size(self) -> int:
        return self.emoji_per_batch + self.icons_per_batch + self.glyphs_per_batch

    def rate(self, step: int) -> float:
        """The learning rate of a step: a ramp, a plain, a ramp."""
        left = (self.num_steps - step) / self.decay_steps
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, max(0.0, left))


class Sampler:
    """Batches of training pairs; the batch of a step is a function of seed and step alone.

    No two pictures of a batch show the same concept, so that every other caption of the batch is wrong for a picture.
    """

    def __init__(self, pairs: Pairs, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self._pairs, self._tokenizer, self._recipe = pairs, tokenizer, recipe
        self._pictures: list[list[int]] = [[] for _ in pairs.concepts]
        for picture in np.flatnonzero(~pairs.unseen).tolist():
            self._pictures[pairs.concept_of[picture]].append(picture)
        self._of_kind = {
            kind: np.array([i for i, c in enumerate(pairs.concepts) if c.kind == kind and self._pictures[i]])
            for kind in ("emoji", "icon", "glyph")
        }

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """([B, 48, 48, 3] uint8, [B, 20] int32)."""
        recipe, pairs = self._recipe, self._pairs
        rng = np.random.default_rng([recipe.seed, step])
        counts = {"emoji": recipe.emoji_per_batch, "icon": recipe.icons_per_batch, "glyph": recipe.glyphs_per_batch}
        images, texts = [], []
        for kind, count in counts.items():
            for index in rng.choice(self._of_kind[kind], count, replace=False):
                concept = pairs.concepts[index]
                picture = self._pictures[index][rng.integers(len(self._pictures[index]))]
                words = f"{concept.name} {' '.join(concept.words)}"
                may_flip = (
                    kind != "glyph"
                    and concept.group != "Flags"
                    and not any(
                        word in words
                        for word in ("left", "right", "clock", "letter", "number", "button", "text", "keycap")
                    )
                )
                is_monochrome = bool(pairs.monochrome[picture])
                images.append(training_image(pairs.images[picture], is_monochrome, may_flip, rng))
                texts.append(caption(concept, rng))
        return np.stack(images), tokenize(self._tokenizer, texts)


def _dense_in_bfloat16(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """For `nn.intercept_methods`: dense layers' products in bfloat16 with float32 sums, forwards and backwards."""
    if not isinstance(context.module, nn.Dense) or context.method_name != "__call__":
        return call(*args, **kwargs)
    params = context.module.variables["params"]
    return dense(args[0], params["kernel"], jnp.bfloat16) + params.get("bias", 0.0)


def initial_params(vision: ViTConfig, text: TextConfig, seed: int) -> dict[str, Any]:
    """{"vision": …, "text": …, "logit_scale": []}, random."""
    keys = jax.random.split(jax.random.key(seed))
    pixels = jnp.zeros((1, vision.image_size, vision.image_size, 3))
    return {
        "vision": VisionTower(vision).init(keys[0], pixels)["params"],
        "text": TextTower(text).init(keys[1], jnp.zeros((1, MAX_TOKENS), jnp.int32))["params"],
        "logit_scale": jnp.asarray(np.log(1 / 0.07), jnp.float32),
    }


def num_parameters(params: dict[str, Any]) -> dict[str, int]:
    """How many numbers each tower has."""
    return {tower: sum(leaf.size for leaf in jax.tree.leaves(params[tower])) for tower in ("vision", "text")}


def make_step(vision: ViTConfig, text: TextConfig, tx: optax.GradientTransformation) -> Any:
    """The compiled step: (params, opt_state, images, tokens, rate) -> (params, opt_state, loss, accuracy)."""

    def loss_fn(params: Any, images: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        pixels = (images.astype(jnp.float32) / 255 - MEAN) / STD
        with nn.intercept_methods(_dense_in_bfloat16):
            seen = VisionTower(vision).apply({"params": params["vision"]}, pixels).projected
            said = TextTower(text).apply({"params": params["text"]}, tokens).projected
        seen, said = (each / jnp.linalg.norm(each, axis=1, keepdims=True) for each in (seen, said))
        logits = jnp.exp(jnp.minimum(params["logit_scale"], MAX_SCALE)) * seen @ said.T
        labels = jnp.arange(len(images))
        losses = [optax.softmax_cross_entropy_with_integer_labels(each, labels).mean() for each in (logits, logits.T)]
        return sum(losses) / 2, (jnp.argmax(logits, axis=1) == labels).mean()

    @jax.jit
    def step(params: Any, opt_state: Any, images: Any, tokens: Any, rate: Any) -> Any:
        (loss, accuracy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, images, tokens)
        opt_state.hyperparams["learning_rate"] = rate
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss, accuracy

    return step


def make_tx(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW on matrices' weights, clipped; the rate is given anew at each step."""

    def decayed(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    def adamw(learning_rate: Any) -> optax.GradientTransformation:
        adam = optax.adamw(learning_rate, b2=0.98, weight_decay=recipe.weight_decay, mask=decayed)
        return optax.chain(optax.clip_by_global_norm(1.0), adam)

    return optax.inject_hyperparams(adamw)(learning_rate=0.0)


def train(pairs: Pairs, tokenizer: Tokenizer, recipe: Recipe, folder: Path, save_every: int = 250) -> dict[str, Any]:
    """Trains, or goes on where the last checkpoint in `folder` was made.

    Writes folder/checkpoint.msgpack (replaced whole), folder/plain.msgpack (the last one before the rate falls, to go
    on from in a longer run), and a line of folder/log.jsonl for every 50 steps.
    Returns: the parameters.
    """
    text = text_config(tokenizer.get_vocab_size())
    sampler = Sampler(pairs, tokenizer, recipe)
    tx = make_tx(recipe)
    params = initial_params(VISION, text, recipe.seed)
    state = {"params": params, "opt_state": tx.init(params), "step": 0, "seconds": 0.0}
    folder.mkdir(parents=True, exist_ok=True)
    decay_start = recipe.num_steps - recipe.decay_steps
    checkpoint, plain = folder / "checkpoint.msgpack", folder / "plain.msgpack"
    if checkpoint.exists():
        state = serialization.from_bytes(state, checkpoint.read_bytes())
        if decay_start < state["step"] < recipe.num_steps and plain.exists():
            print("going on from the checkpoint; its rate may have begun to fall", flush=True)
    step = make_step(VISION, text, tx)
    print(f"{(~pairs.unseen).sum()} pictures; from step {state['step']} to {recipe.num_steps}", flush=True)
    params, opt_state = state["params"], state["opt_state"]
    started, before, sums = time.monotonic(), float(state["seconds"]), []
    for number in range(int(state["step"]), recipe.num_steps):
        images, tokens = sampler.batch(number)
        rate = jnp.float32(recipe.rate(number))
        params, opt_state, loss, accuracy = step(params, opt_state, images, tokens, rate)
        sums.append((loss, accuracy))
        done = number + 1
        if done % 50 == 0:
            loss_mean, accuracy_mean = (float(value) for value in np.mean(np.array(sums, np.float64), axis=0))
            if not np.isfinite(loss_mean):
                raise FloatingPointError(f"the loss of the steps up to {done} is {loss_mean}")
            seconds = before + time.monotonic() - started
            line = {"step": done, "loss": round(loss_mean, 4), "accuracy": round(accuracy_mean, 4)}
            line |= {"rate": float(rate), "seconds": round(seconds, 1)}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(line, flush=True)
            sums = []
        if done % save_every == 0 or done == recipe.num_steps:
            state = {
                "params": params,
                "opt_state": opt_state,
                "step": done,
                "seconds": before + time.monotonic() - started,
            }
            _write(checkpoint, serialization.to_bytes(state))
            if done <= decay_start:
                _write(plain, checkpoint.read_bytes())
    return params


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_bytes(content)
    os.replace(partial, path)
