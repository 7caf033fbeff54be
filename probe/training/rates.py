"""The options that say who learns how fast, compiled to the ordered list of rules that `probe.training.optim` takes.

Either `--rates` is that list, or it is made of the sugar: `--freeze`, `--unfreeze-last`, `--backbone-lr`,
`--head-lr` and `--layer-decay`. The two do not mix: which of them should win would be a guess.
"""

import dataclasses
import math
import re
from typing import Any

from flax import traverse_util

from probe.errors import ConfigError
from probe.training import optim

DEFAULT_BACKBONE_LR = 1e-5
DEFAULT_HEAD_LR = 1e-3

# CLIP's projection stands after the pooler, so the head never sees it: no gradient would hold it, and weight
# decay alone would melt it.
_PROJECTION = "backbone/visual_projection"
_TOP = "backbone/post_layernorm"  # CLIP's norm after the last block
_BLOCK = re.compile(r"(backbone/encoder/(?:layers_(\d+)|stages_(\d+)/layers_(\d+)))/.*")

Rules = dict[str, float | str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateOptions:
    """The options as they were given; None or () where one was not.

    rates: "pattern=rate", in order, the rate a number or "frozen"; freeze: patterns; unfreeze_last: blocks;
    backbone_lr, head_lr: peak step sizes; layer_decay: the rate of a block ÷ that of the block above it.
    """

    rates: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    unfreeze_last: int | None = None
    backbone_lr: float | None = None
    head_lr: float | None = None
    layer_decay: float | None = None

    def given(self) -> list[str]:
        """The options that were given, as one writes them."""
        names = [name for name, value in dataclasses.asdict(self).items() if value not in (None, ())]
        return [f"--{name.replace('_', '-')}" for name in names]


def make_rules(options: RateOptions, params: dict[str, Any]) -> Rules:
    """The ordered rules pattern -> rate or "frozen" for a classifier's {"backbone": …, "head": …}.

    Raises: ConfigError for options that clash, that have no effect, or that do not fit the parameters.
    """
    rules: Rules = {_PROJECTION: optim.FROZEN} if "visual_projection" in params["backbone"] else {}
    if options.rates:
        if others := dataclasses.replace(options, rates=()).given():
            raise ConfigError(
                f"--rates is the whole list of rules and does not mix with {', '.join(others)}: write these as "
                "rules too, for instance --rates 'backbone/**=frozen' --rates 'head/**=1e-3'"
            )
        listed = [_parse(rule) for rule in options.rates]
        patterns = [pattern for pattern, _ in listed]
        rules |= dict(listed)
        effective = {part.pattern for part in optim.parts(params, rules)}
        idle = [
            pattern
            for number, pattern in enumerate(patterns)
            if pattern not in effective or pattern in patterns[:number]  # the same again
        ]
        if idle:
            raise ConfigError(
                f"--rates {', '.join(idle)}: earlier rules take every parameter of it. The first match wins, so "
                "put the narrower pattern first."
            )
        return rules
    rules |= dict.fromkeys(options.freeze, optim.FROZEN)
    for pattern, rate in _backbone_rules(options, params).items():
        rules.setdefault(pattern, rate)
    rules.setdefault("head", DEFAULT_HEAD_LR if options.head_lr is None else options.head_lr)
    learning = [part.pattern for part in optim.parts(params, rules) if part.label != optim.FROZEN]
    if "head" not in learning and options.head_lr is not None:
        raise ConfigError("--head-lr cannot act: --freeze takes all of the head")
    given = dataclasses.replace(options, freeze=(), head_lr=None)
    if options.backbone_lr == 0:
        if others := dataclasses.replace(given, backbone_lr=None).given():
            raise ConfigError(f"{', '.join(others)} cannot act: --backbone-lr 0 freezes the backbone")
    elif given.given() and not any(pattern.startswith("backbone") for pattern in learning):
        raise ConfigError(f"{', '.join(given.given())} cannot act: --freeze takes all of the backbone")
    return rules


def _backbone_rules(options: RateOptions, params: dict[str, Any]) -> Rules:
    """The last block and the norm above it learn at --backbone-lr, each block below at its share of that."""
    rate = DEFAULT_BACKBONE_LR if options.backbone_lr is None else options.backbone_lr
    if rate == 0:
        return {"backbone": optim.FROZEN}
    if options.layer_decay is None and options.unfreeze_last is None:
        return {"backbone": rate}
    depths = list(enumerate(reversed(blocks(params))))
    decay = 1.0 if options.layer_decay is None else options.layer_decay
    num_trained = len(depths) if options.unfreeze_last is None else options.unfreeze_last
    if num_trained > len(depths):
        raise ConfigError(f"--unfreeze-last {num_trained}: the backbone has {len(depths)} blocks")
    rules: Rules = {_TOP: rate} if "post_layernorm" in params["backbone"] else {}
    for depth, block in depths:
        rules[block] = rate * decay**depth if depth < num_trained else optim.FROZEN
    below = rate * decay ** len(depths) if options.unfreeze_last is None else optim.FROZEN
    return rules | {"backbone": below}


def num_frozen_blocks(labels: optim.Labels) -> int:
    """How many blocks, from the pixels up, stand below all that learns: 0 where what is before the first one learns.

    Args:
      labels: of a classifier's parameters, as `optim.partition` gives them.
    """
    ordered = blocks(labels)

    def height(path: str) -> int:
        """Of the block that a parameter is in; of what stands above all blocks, their number."""
        if path.startswith(("head/", f"{_TOP}/", f"{_PROJECTION}/")):
            return len(ordered)
        return next((number for number, block in enumerate(ordered) if path.startswith(f"{block}/")), 0)

    flat = traverse_util.flatten_dict(labels, sep="/")
    return min(height(path) for path, label in flat.items() if label != optim.FROZEN)


def _parse(rule: str) -> tuple[str, float | str]:
    pattern, equals, rate = rule.rpartition("=")
    if not equals or not pattern:
        raise ConfigError(f"--rates {rule}: write pattern=rate, for instance 'backbone/**=1e-5'")
    if rate == optim.FROZEN:
        return pattern, rate
    try:
        value = float(rate)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"--rates {rule}: the rate must be a positive number or 'frozen', got {rate!r}")
    return pattern, value


def blocks(params: dict[str, Any]) -> list[str]:
    """Paths of the backbone's blocks, from the one next to the pixels to the one next to the head."""
    found = {
        match[1]: tuple(int(number) for number in match.groups()[1:] if number is not None)
        for path in traverse_util.flatten_dict(params, sep="/")
        if (match := _BLOCK.fullmatch(path))
    }
    return sorted(found, key=lambda path: found[path])
