"""Batches of training pairs, drawn by as many processes as there are cores."""

import dataclasses
import multiprocessing
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data.pretrain.augment import training_image
from data.pretrain.captions import caption, load_tokenizer, tokenize
from data.pretrain.pairs import Pairs, load_pairs


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How long and how fast to train. All of it may differ when a run is continued."""

    num_steps: int = 11_000
    decay_steps: int = 2_750  # the last ones, in which the rate falls to 0
    warmup_steps: int = 500
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    emoji_per_batch: int = 576
    icons_per_batch: int = 400
    glyphs_per_batch: int = 48
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
        """([B, 64, 64, 3] uint8, [B, 20] int32)."""
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


_sampler: Sampler  # in a process that draws batches


def _start_drawing(pairs: Path, tokenizer: Path, recipe: Recipe) -> None:
    global _sampler
    _sampler = Sampler(load_pairs(pairs), load_tokenizer(tokenizer), recipe)


def _draw(step: int) -> tuple[np.ndarray, np.ndarray]:
    return _sampler.batch(step)


def drawn_batches(work: Path, recipe: Recipe, steps: range) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`Sampler.batch` of each step in order, drawn ahead by a process per core from what `work` holds."""
    num_processes = os.cpu_count() or 1
    given = (work / "pairs", work / "tokenizer", recipe)
    context = multiprocessing.get_context("forkserver")  # JAX's threads do not survive a fork
    with ProcessPoolExecutor(num_processes, context, initializer=_start_drawing, initargs=given) as pool:
        ahead: deque[Future[tuple[np.ndarray, np.ndarray]]] = deque()
        for step in steps:
            ahead.append(pool.submit(_draw, step))
            if len(ahead) > 2 * num_processes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
