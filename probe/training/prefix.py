"""The frozen first blocks of a backbone, applied once: what enters the first block that learns, cached.

Training then runs the rest of the tower alone. A training image has one row of activations per augmented view, drawn
as training without the cache draws it, by (seed, view, example), so that the losses are the same to float error. Rows
that only choose or judge have one, of the plain picture, computed in float32 whatever training computes in.

Of several processes each computes some of the shards, on its own devices, and reads what the others have sealed.
"""

import collections
import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from probe import distributed, interrupt
from probe.backbones import Backbone, normalize_pixels
from probe.backbones.split import count_blocks, make_prefix, make_suffix
from probe.errors import ConfigError, MismatchError, NumericalError, StorageError
from probe.progress import Progress
from probe.splits import Splits
from probe.training.activations import FILE_NAME, Activations
from probe.training.augment import AugmentConfig
from probe.training.decoded import ImageRows
from probe.training.full import make_prepare
from probe.training.optim import Labels
from probe.training.rates import num_frozen_blocks
from probe.training.sharding import Placement
from probe.training.steps import Batch, Params, filled_up, make_batch, padded_batch

_PROGRAM = 1  # raise it when towers or augmentation give other numbers for the same weights and images
_TABLES = ("train", "plain")  # folders: the views of the training rows, and the plain pictures of all others
_ALL = slice(None)
_BATCHES_IN_FLIGHT = 2  # the device computes one while the next is sent


def blocks_to_cache(
    asked: str,
    backbone: Backbone,
    labels: Labels,
    augmentation: AugmentConfig,
    *,
    epochs: int,
    views: int | None,
    train_batchnorm: bool,
) -> tuple[int, str | None]:
    """How many frozen blocks are worth caching, 0 for none; and what a person should know about it.

    Args:
      asked: "auto": where it pays, which is where a row is used in more than one epoch, and either the device is a CPU
        or all blocks are frozen (an accelerator computes a block sooner than a disk gives its activations); "off"; or
        a folder: wherever it is possible.
      labels: of the classifier's parameters.
    Raises: ConfigError if a folder was given, and frozen blocks do not give the same in every epoch, or there are none.
    """
    num_blocks = num_frozen_blocks(labels)
    if asked == "off":
        return 0, None
    if num_blocks == 0:
        why = "the first block of the backbone learns, or what is below it"
    elif train_batchnorm:
        why = "--train-batchnorm moves the statistics of frozen layers, too"
    elif getattr(backbone.config, "attention_dropout", 0):
        why = "the backbone has dropout, which frozen layers have in training as well"
    elif augmentation.mixes:
        why = "mixup and CutMix make each picture anew of two"
    elif augmentation.changes_images and views is None:
        why = "augmentation makes each picture anew; --views N would fix N of each"
    elif asked != "auto":
        return num_blocks, None
    else:
        is_reused = epochs > num_views(augmentation, views, epochs)
        is_quicker = jax.devices()[0].platform == "cpu" or num_blocks == count_blocks(backbone.config)
        return (num_blocks if is_reused and is_quicker else 0), None
    if asked != "auto":
        raise ConfigError(f"--cache-prefix {asked}: nothing stays the same from epoch to epoch: {why}")
    return 0, f"the {num_blocks} frozen blocks are computed in every epoch: {why}" if num_blocks else None


def num_views(augmentation: AugmentConfig, views: int | None, epochs: int) -> int:
    """How many pictures there are of each training image in all epochs."""
    if not (augmentation.changes_images or augmentation.mixes):
        return 1
    return epochs if views is None else min(views, epochs)


def remove_activations(folder: Path) -> None:
    """Removes what a `FrozenPrefix` has cached in a folder, if anything, and the folder if nothing else is in it."""
    for name in _TABLES:
        if (folder / name / FILE_NAME).is_file():
            shutil.rmtree(folder / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


class FrozenPrefix:
    """The activations of one fine-tuning's rows, as batches that take the place of the images'."""

    def __init__(
        self,
        backbone: Backbone,
        num_blocks: int,
        images: ImageRows,
        rows: Splits,
        augmentation: AugmentConfig,
        *,
        views: int,
        seed: int,
        bfloat16: bool,
        batch_size: int,
        fsdp: bool,
        folder: Path,
    ) -> None:
        """
        Args:
          num_blocks: the frozen blocks, 1 or more.
          augmentation: of the training rows; it mixes no pictures.
          views: of each training image, see `num_views`; epoch e sees view e % views.
          seed: of the augmentation. bfloat16: whether training computes in it.
          batch_size: images that this process computes at once. fsdp: divide the weights over its devices.
          folder: of the cached activations.
        """
        self.folder, self.num_blocks, self.views = folder, num_blocks, views
        self._backbone, self._images = backbone, images
        self._placement = Placement.over_own_devices(batch_size, fsdp=fsdp)
        self._batch_size, self._seed = batch_size, seed
        augmentation = dataclasses.replace(augmentation, label_smoothing=0.0)  # of targets, not of pictures
        self._prepare = make_prepare(augmentation, len(images.source.class_names))
        self._plain_training = self._prepare is None and not bfloat16
        self._rows = {"train": rows.train, "plain": np.sort(np.concatenate([rows.val, rows.test]))}
        dtype = jnp.bfloat16 if bfloat16 else jnp.float32
        self._programs = {"train": self._program(self._prepare, dtype), "plain": self._program(None, jnp.float32)}
        chance = {"augmentation": dataclasses.asdict(augmentation), "seed": seed} if self._prepare else {}
        how = {"compute_dtype": np.dtype(dtype).name, **chance}
        self._tables = {
            "train": self._table("train", views, how),
            "plain": self._table("plain", 1, {"compute_dtype": "float32"}),
        }

    def claim(self, *, rebuild: bool) -> None:
        """Looks at what the folder holds already.

        Args:
          rebuild: remove activations that were made in another way; else they are an error.
        Raises: MismatchError with the fields that differ; InputError if it holds something else; CorruptError.
        """

        def claim() -> None:
            for table in self._tables.values():
                try:
                    table.check_same()
                except MismatchError:
                    if not rebuild:
                        raise
                    table.remove()

        distributed.on_first(claim)

    @property
    def num_bytes(self) -> int:
        """What is still to be written."""
        return sum(table.num_bytes(table.missing()) for table in self._tables.values())

    def require_room(self) -> None:
        """Raises: StorageError if the disk has no room for `num_bytes`."""
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free
        if self.num_bytes > free:
            raise StorageError(
                f"{self.folder}: the activations of the frozen blocks take {self.num_bytes / 1e6:,.1f} MB, and "
                f"{free / 1e6:,.1f} MB are free: free some space, give a folder elsewhere to --cache-prefix, or "
                "--cache-prefix off"
            )

    def describe(self) -> str:
        """What is to be computed and written, for people."""
        total = count_blocks(self._backbone.config)
        what = f"the activations after the {self.num_blocks} frozen of {total} blocks"
        if not self.num_bytes:
            return f"{what} are cached in {self.folder}"
        views = f" in {self.views} views" if self.views > 1 else ""
        num_train, num_plain = (len(rows) for rows in self._rows.values())
        return (
            f"computing {what} once, of {num_train:,} training images{views} and {num_plain:,} others: "
            f"{self.num_bytes / 1e6:,.1f} MB in {self.folder}"
        )

    def build(self) -> None:
        """Computes and seals what is missing.

        Raises: StorageError; NumericalError if activations are not finite; Interrupted, what is sealed being kept.
        """

        def look() -> list[tuple[str, range]]:
            found = [(name, part) for name, table in self._tables.items() for part in table.missing()]
            for table in self._tables.values():
                table.create()
            return found

        missing = distributed.on_first(look)[distributed.index() :: distributed.count()]

        def compute() -> None:
            variables = self._placement.place(self._backbone.variables) if missing else {}
            with Progress("frozen blocks", total=sum(len(part) for _, part in missing), unit="images") as progress:
                try:
                    for name, part in missing:
                        self._tables[name].seal(part, self._compute(name, part, variables, progress))
                except interrupt.Interrupted as stop:
                    hint = "the activations computed so far are kept; run it again to go on"
                    raise interrupt.Interrupted(stop.signum, hint) from None

        distributed.on_each(compute)

    def train_batches(self, order: np.ndarray, batch_size: int, epoch: int, own: slice = _ALL) -> Iterator[Batch]:
        """Training rows in the given order, as `ImageRows.batches` has them, activations for inputs."""
        return self._batches("train", order, batch_size, epoch % self.views, own)

    def holds(self, rows: np.ndarray) -> bool:
        """Whether `plain_batches` can be made of these rows."""
        return self._holder(rows) is not None

    def plain_batches(self, rows: np.ndarray, batch_size: int, own: slice = _ALL) -> Iterator[Batch]:
        """The same of plain pictures in float32, for evaluation; of rows that `holds` is true of."""
        name = self._holder(rows)
        assert name is not None
        return self._batches(name, rows, batch_size, 0, own)

    def frozen_above(self, frozen: Params) -> Params:
        """Those of the frozen leaves of {"backbone", "head"} that the rest of the tower reads."""
        table = self._tables["plain"]
        suffix = make_suffix(self._backbone.config, self.num_blocks)
        made = jax.eval_shape(suffix.init, jax.random.key(0), jnp.zeros((1, *table.shape)))
        read = {("backbone", *path) for path in traverse_util.flatten_dict(made.get("params", {}))}
        kept = {
            path: leaf
            for path, leaf in traverse_util.flatten_dict(frozen).items()
            if path[0] != "backbone" or path in read
        }
        return dict(traverse_util.unflatten_dict(kept))

    def close(self) -> None:
        """Closes the files that reading has opened."""
        for table in self._tables.values():
            table.close()

    def _program(self, prepare: Any, dtype: Any) -> Any:
        """Compiles (variables, key of the run, batch of images) -> activations [B, …]."""
        prefix = make_prefix(self._backbone.config, self.num_blocks, dtype=dtype)

        @jax.jit
        def program(variables: dict[str, Any], key: jax.Array, batch: Batch) -> jax.Array:
            images = batch.inputs if prepare is None else prepare(key, batch)[0]
            pixels = normalize_pixels(images, self._backbone.preprocessing)
            with jax.default_matmul_precision("highest"):
                return prefix(variables, pixels)

        return program

    def _table(self, name: str, views: int, how: dict[str, Any]) -> Activations:
        rows, device = self._rows[name], jax.local_devices()[0]
        image = np.zeros((1, *self._backbone.preprocessing.image_size, 3), np.uint8)
        batch = padded_batch(image, np.zeros(1, np.int32), 1, examples=np.zeros(1, np.int32))
        result = jax.eval_shape(self._programs[name], self._backbone.variables, jax.random.key(0), batch)
        identity = {
            "table": name,
            "backbone_fingerprint": self._backbone.fingerprint,
            "num_blocks": self.num_blocks,
            "rows": hashlib.sha256(self._images.keys[rows].tobytes() + rows.astype(np.int64).tobytes()).hexdigest(),
            "views": views,
            "matmul_precision": "highest",
            "batch_size": self._batch_size,
            "device_kind": device.device_kind,
            "num_devices": self._placement.mesh.size,
            "program": _PROGRAM,
            **how,
        }
        return Activations(
            self.folder / name,
            identity,
            num_rows=views * len(rows),
            shape=result.shape[1:],
        )

    def _compute(self, name: str, part: range, variables: dict[str, Any], progress: Progress) -> np.ndarray:
        """[R, …] activations of these rows of a table."""
        computed: list[np.ndarray] = []
        in_flight: collections.deque[tuple[jax.Array, np.ndarray]] = collections.deque()

        def fetch() -> None:
            activations, mask = in_flight.popleft()
            computed.append(np.asarray(activations)[mask])
            progress.advance(int(mask.sum()))

        rows, entries, key = self._rows[name], np.arange(part.start, part.stop), jax.random.key(self._seed)
        for view in np.unique(entries // len(rows)):
            wanted = rows[entries[entries // len(rows) == view] % len(rows)]
            for batch in self._images.batches(wanted, self._batch_size):
                interrupt.check()
                batch = dataclasses.replace(batch, epoch=np.int32(view))
                placed = self._placement.place_batch(batch)
                in_flight.append((self._programs[name](variables, key, placed), batch.mask))
                if len(in_flight) > _BATCHES_IN_FLIGHT:
                    fetch()
        while in_flight:
            fetch()
        activations = np.concatenate(computed)
        finite = np.isfinite(activations.reshape(len(activations), -1)).all(axis=1)
        if not finite.all():
            example = self._images.examples[rows[entries[~finite][0] % len(rows)]]
            raise NumericalError(f"{example.name!r}: its activations in the frozen blocks are not finite")
        return activations

    def _holder(self, rows: np.ndarray) -> str | None:
        names = ("plain", "train") if self._plain_training else ("plain",)
        return next((name for name in names if np.isin(rows, self._rows[name]).all()), None)

    def _batches(self, name: str, order: np.ndarray, batch_size: int, view: int, own: slice) -> Iterator[Batch]:
        rows, table = self._rows[name], self._tables[name]
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            filled = filled_up(chosen, batch_size)
            inputs = table.read(view * len(rows) + np.searchsorted(rows, filled[own]))
            yield make_batch(inputs, self._images.labels[filled], len(chosen), examples=filled)
