"""Who learns, and how fast: parameter partitions, the optimizer over them, schedules, weight decay.

A partition is an ordered mapping pattern -> label over parameter paths such as "head/kernel"; the first
pattern that matches a path labels it. A label is a learning rate, or FROZEN, or whatever name one gives
`optax.multi_transform`. In a pattern `*` stands for part of one name, `**` for any number of names, and what
matches an inner node covers all below it: "backbone" is every parameter of the backbone.
"""

import dataclasses
import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from probe.errors import ConfigError

FROZEN = "frozen"  # the label of what gets neither gradient nor optimizer state

Params = dict[str, Any]  # nested dicts of arrays
Labels = dict[str, Any]  # the same nested dicts, of labels


def partition(params: Params, rules: Mapping[str, Hashable]) -> Labels:
    """Labels every parameter by the first rule whose pattern matches its path.

    Args:
      params: nested dicts.
      rules: pattern -> label, in order.
    Returns: nested dicts like `params`, with labels for leaves, as `optax.multi_transform` takes them.
    Raises: ConfigError that lists the parameters no rule covers and the rules that cover no parameter.
    """
    labels = {path: rules[pattern] for path, pattern in _assign(params, rules).items()}
    return dict(traverse_util.unflatten_dict(labels, sep="/"))


@dataclasses.dataclass(frozen=True)
class Part:
    """The parameters that one rule labels: how many numbers they are."""

    pattern: str
    label: Any
    num_parameters: int


def parts(params: Params, rules: Mapping[str, Hashable]) -> list[Part]:
    """What each rule covers, in the order of the rules; one that earlier rules left nothing is left out.

    Raises: ConfigError as `partition` does.
    """
    leaves, patterns = traverse_util.flatten_dict(params, sep="/"), _assign(params, rules)
    sizes = {pattern: sum(leaves[path].size for path in leaves if patterns[path] == pattern) for pattern in rules}
    return [Part(pattern, rules[pattern], size) for pattern, size in sizes.items() if size]


def _assign(params: Params, rules: Mapping[str, Hashable]) -> dict[str, str]:
    """The pattern that each path falls to."""
    paths = traverse_util.flatten_dict(params, sep="/")
    covered = {pattern: _matches(pattern, paths) for pattern in rules}
    assigned = {path: pattern for pattern in reversed(list(rules)) for path in covered[pattern]}  # first wins
    uncovered = sorted(set(paths) - set(assigned))
    idle = sorted(pattern for pattern, matches in covered.items() if not matches)
    if uncovered or idle:
        raise ConfigError(
            "rules and parameters do not fit together; "
            f"parameters without a rule: {', '.join(uncovered) or 'none'}; "
            f"rules without a parameter: {', '.join(idle) or 'none'}"
            + (
                f"; the parameters are: {', '.join(sorted({re.sub(r'_[0-9]+', '_*', p) for p in paths}))}"
                if idle
                else ""
            )
        )
    return assigned


def _matches(pattern: str, paths: Iterable[str]) -> list[str]:
    names = [
        r"(?:[^/]+/)*" if name == "**" else "[^/]*".join(map(re.escape, name.split("*"))) + "/"
        for name in pattern.strip("/").split("/")
    ]
    regex = re.compile("".join(names) + r"(?:[^/]+/)*")
    return [path for path in paths if regex.fullmatch(f"{path}/")]


def split(params: Params, labels: Labels) -> tuple[Params, Params]:
    """The trainable leaves and the frozen ones, as two nested dicts that share no leaf."""
    flat, flat_labels = traverse_util.flatten_dict(params), traverse_util.flatten_dict(labels)
    trainable = {path: leaf for path, leaf in flat.items() if flat_labels[path] != FROZEN}
    frozen = {path: leaf for path, leaf in flat.items() if flat_labels[path] == FROZEN}
    return dict(traverse_util.unflatten_dict(trainable)), dict(traverse_util.unflatten_dict(frozen))


def make_optimizer(
    labels: Labels,
    *,
    num_steps: int,
    warmup_steps: int,
    weight_decay: float,
    momentum: float | None = None,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """AdamW, or SGD, over each part at its own rate, through `optax.multi_transform`.

    Args:
      labels: of the trainable leaves alone: the peak learning rate of each.
      num_steps, warmup_steps: of `warmup_cosine`.
      weight_decay: decoupled, so a step shrinks a weight by (rate · weight_decay); see `decay_mask`.
      momentum: of SGD; None for AdamW.
      clip_norm: longest gradient, measured over all parts together.
    """

    def part(rate: float) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam() if momentum is None else optax.trace(momentum),
            optax.add_decayed_weights(weight_decay, decay_mask),
            optax.scale_by_learning_rate(warmup_cosine(rate, num_steps=num_steps, warmup_steps=warmup_steps)),
        )

    parts: dict[Hashable, Any] = {rate: part(rate) for rate in sorted(set(jax.tree.leaves(labels)))}
    tx = optax.multi_transform(parts, labels)
    return tx if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), tx)


def decay_mask(params: Params) -> Params:
    """True where weight decay applies: the leaves that Flax names `kernel` (Dense, Conv, patch embedding).

    A kernel multiplies the activations, so its size bounds how fast the function can change. Biases, the
    scales of norms, the class token and the position embeddings shift or rescale and do not compound: to pull
    them to zero is to pull a pretrained tower away from where it was trained.
    """
    mask: Params = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
    return mask


def warmup_cosine(peak: float, *, num_steps: int, warmup_steps: int) -> optax.Schedule:
    """Rises linearly to `peak` over `warmup_steps`, then falls as a cosine, to reach 0 after `num_steps`.

    The first step has a rate above 0 and so has the last: a run of one step trains.
    """

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        rise = (count + 1) / (warmup_steps + 1)
        progress = (count - warmup_steps) / max(num_steps - warmup_steps, 1)
        fall = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))
        return peak * jnp.minimum(rise, 1) * fall

    return schedule
