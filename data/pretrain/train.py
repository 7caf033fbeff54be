"""The contrastive training: two towers, one temperature, cross-entropy both ways (Radford et al. 2021).

The dense layers multiply in bfloat16 with float32 sums. The learning rate stands still between its rise and its fall,
so that a run can be made longer after the fact.
"""

import functools
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

from data.pretrain.augment import SIZE
from data.pretrain.batches import Recipe, drawn_batches
from data.pretrain.captions import MAX_TOKENS, VOCAB_SIZE, load_tokenizer
from data.pretrain.pairs import load_pairs
from probe.backbones.products import dense
from probe.backbones.text import TextConfig, TextTower
from probe.backbones.vit import VisionTower, ViTConfig

PROJECTION = 128
VISION = ViTConfig(
    hidden_size=192,
    intermediate_size=768,
    projection_dim=PROJECTION,
    num_hidden_layers=6,
    num_attention_heads=6,
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


def _dense_in_bfloat16(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """For `nn.intercept_methods`: dense layers' products in bfloat16 with float32 sums, forwards and backwards."""
    if not isinstance(context.module, nn.Dense) or context.method_name != "__call__":
        return call(*args, **kwargs)
    params = context.module.variables["params"]
    return dense(args[0], params["kernel"], jnp.bfloat16) + params.get("bias", 0.0)


@functools.partial(jax.jit, static_argnums=(0, 1))
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


@functools.cache  # a run that goes on in the same process compiles nothing
def make_step(vision: ViTConfig, text: TextConfig, weight_decay: float) -> Any:
    """The compiled step: (params, opt_state, images, tokens, rate) -> (params, opt_state, loss, accuracy)."""
    tx = make_tx(weight_decay)

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


def make_tx(weight_decay: float) -> optax.GradientTransformation:
    """AdamW on matrices' weights, clipped; the rate is given anew at each step."""

    def decayed(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    def adamw(learning_rate: Any) -> optax.GradientTransformation:
        adam = optax.adamw(learning_rate, b2=0.98, weight_decay=weight_decay, mask=decayed)
        return optax.chain(optax.clip_by_global_norm(1.0), adam)

    return optax.inject_hyperparams(adamw)(learning_rate=0.0)


def train(work: Path, recipe: Recipe, vision: ViTConfig = VISION, save_every: int = 250) -> dict[str, Any]:
    """Trains on work/pairs with work/tokenizer, or goes on where the last checkpoint in folder, work/train, was made.

    Writes folder/checkpoint.msgpack (replaced whole), folder/plain.msgpack (the last one before the rate falls, to go
    on from in a longer run), and a line of folder/log.jsonl for every 50 steps.
    Returns: the parameters.
    """
    folder, pairs = work / "train", load_pairs(work / "pairs")
    text = text_config(load_tokenizer(work / "tokenizer").get_vocab_size())
    params = initial_params(vision, text, recipe.seed)
    state = {"params": params, "opt_state": make_tx(recipe.weight_decay).init(params), "step": 0, "seconds": 0.0}
    folder.mkdir(parents=True, exist_ok=True)
    decay_start = recipe.num_steps - recipe.decay_steps
    checkpoint, plain = folder / "checkpoint.msgpack", folder / "plain.msgpack"
    if checkpoint.exists():
        state = serialization.from_bytes(state, checkpoint.read_bytes())
        if decay_start < state["step"] < recipe.num_steps and plain.exists():
            print("going on from the checkpoint; its rate may have begun to fall", flush=True)
    step = make_step(vision, text, recipe.weight_decay)
    print(f"{(~pairs.unseen).sum()} pictures; from step {state['step']} to {recipe.num_steps}", flush=True)
    params, opt_state = state["params"], state["opt_state"]
    started, before, sums = time.monotonic(), float(state["seconds"]), []
    steps = range(int(state["step"]), recipe.num_steps)
    for number, (images, tokens) in zip(steps, drawn_batches(work, recipe, steps), strict=True):
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
