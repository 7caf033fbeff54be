"""What all towers share: the form of their output, and the activations that a config may name."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax import struct

from probe.errors import InputError


@struct.dataclass
class TowerOutput:
    """What a tower makes of a batch of images; all float32, none normalised to unit length.

    last_hidden_state: [B, 1 + patches, D] (CLIP, the class token first) or [B, h, w, D] (ResNet).
    pooler_output: [B, D], what the other parts of this package call the embeddings.
    projected: [B, P], the image's place in the space shared with text, where the checkpoint has a projection.
    """

    last_hidden_state: jax.Array
    pooler_output: jax.Array
    projected: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a tower arranged for inference: a pure function, and the weights that it was prepared for.

    apply: (weights, what the stage before gave) -> what the next one takes. Stages of equal form share one function.
    """

    name: str
    apply: Callable[[Any, Any], Any]
    weights: Any


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),  # linen's default is the tanh approximation
    "quick_gelu": _quick_gelu,
    "relu": nn.relu,
    "silu": nn.silu,
}


def check_fields(config: object, rule: Callable[[Any], bool], wording: str, *fields: str) -> None:
    """Raises one InputError listing those of a config's `fields` whose values break `rule`."""
    broken = [f"{field} is {getattr(config, field)!r}" for field in fields if not rule(getattr(config, field))]
    if broken:
        raise InputError(f"{', '.join(broken)}; must be {wording}")


def is_count(value: object) -> bool:
    """Whether it is an integer of at least 1; JSON's true is not one."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value: object) -> bool:
    """Whether it is a finite number; JSON's true is not one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_activation(config: object) -> None:
    """Raises InputError if `config.hidden_act` is none of ACTIVATIONS."""
    known = tuple(ACTIVATIONS)
    check_fields(config, lambda name: name in known, f"one of {', '.join(known)}", "hidden_act")
