"""A classifier out of words: one direction per class, the mean of what prompts about it are encoded to.

Source: Radford et al. 2021 (arXiv:2103.00020), section 3.1.4, prompt ensembling.
"""

from collections.abc import Sequence

import numpy as np

from probe.backbones import TextEncoder
from probe.errors import InputError
from probe.heads import TrainedHead


def class_directions(encoder: TextEncoder, class_names: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
    """[C, P] float32 of unit length: for each class the mean direction of its prompts.

    Args:
      prompts: texts with {} where the class's name goes, its underscores as spaces.
    Raises: InputError if prompts of a class cancel out, and what `TextEncoder.encode` raises.
    """
    names = [name.replace("_", " ") for name in class_names]
    texts = [prompt.replace("{}", name) for name in names for prompt in prompts]
    means = encoder.encode(texts).reshape(len(names), len(prompts), -1).mean(axis=1)
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    if not norms.all():
        raise InputError(f"{encoder.name}: prompts of one class point in opposite directions; give others")
    return np.asarray(means / norms, np.float32)


def zero_shot_head(directions: np.ndarray, logit_scale: float) -> TrainedHead:
    """The linear head on the projected view whose logits are CLIP's: logit_scale · cosine of image and class.

    Args:
      directions: [C, P] of unit length; two classes have one logit, the difference of theirs.
    """
    kernel = logit_scale * directions.T.astype(np.float64)
    if kernel.shape[1] == 2:
        kernel = kernel[:, 1:] - kernel[:, :1]
    zeros = np.zeros(kernel.shape[1], np.float32)
    unit_norm = np.ones((), np.float32)
    return TrainedHead(hidden=(), params={"kernel": kernel.astype(np.float32), "bias": zeros, "unit_norm": unit_norm})
