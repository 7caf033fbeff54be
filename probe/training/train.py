"""`fit`: epochs of train steps, each evaluated, the best one kept; a run that is cut off goes on to the bit.

Knows an `apply_fn` (see `probe.training.steps`), not which mode it is in.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from probe import distributed, interrupt
from probe.devices import fetch
from probe.errors import NumericalError
from probe.evaluation.choice import best_candidate, score
from probe.evaluation.metrics import Metrics
from probe.training import checkpoints
from probe.training.steps import (
    ApplyFn,
    Batch,
    Params,
    Prepare,
    TrainState,
    make_eval_step,
    make_train_step,
    predict_logits,
)

_STEPS_BETWEEN_CHECKS = 50  # after so many the host looks at the losses
_STEPS_AHEAD = 2  # dispatched before the device has done them: it is kept busy, and a signal need not wait for more


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One line of the history: losses in nats, accuracies as shares; training's are means on the way."""

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Trainable leaves and model state after an epoch, as NumPy arrays."""

    params: Params
    model_state: Any


@dataclasses.dataclass(frozen=True)
class FitResult:
    """What `fit` found.

    history: one line per epoch, and `best`, the index of the best; snapshots: by epoch index, those wanted.
    val_logits: [E, N, C], what was said of the N validation rows after each epoch; val_labels: [N].
    """

    history: list[Epoch]
    best: int
    snapshots: dict[int, Snapshot]
    val_logits: np.ndarray
    val_labels: np.ndarray

    @property
    def params(self) -> Params:
        """The trainable leaves of the best epoch."""
        return self.snapshots[self.best].params

    @property
    def model_state(self) -> Any:
        """The model state of the best epoch."""
        return self.snapshots[self.best].model_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Where and how often a run is saved.

    folder: of this run's checkpoints. every_steps: besides those after every epoch. record: JSON values that
    must be the same when the run goes on. resume: go on from the last checkpoint where there is one.
    """

    folder: Path
    every_steps: int
    record: Mapping[str, Any]
    resume: bool


def best_epoch(val_logits: np.ndarray, val_labels: np.ndarray) -> set[int]:
    """The epoch whose snapshot is kept where nothing else is asked for."""
    return {best_candidate(val_logits, val_labels)}


def fit(
    apply_fn: ApplyFn,
    tx: optax.GradientTransformation,
    params: Params,
    *,
    train_batches: Callable[[int], Iterable[Batch]],
    val_batches: Callable[[], Iterable[Batch]],
    num_epochs: int,
    seed: int,
    frozen: Params | None = None,
    model_state: Any = None,
    prepare: Prepare | None = None,
    num_microbatches: int = 1,
    average_decay: float | None = None,
    patience: int | None = None,
    wanted: Callable[[np.ndarray, np.ndarray], set[int]] = best_epoch,
    place: Callable[[Any], Any] = lambda tree: tree,
    place_batch: Callable[[Batch], Batch] = lambda batch: batch,
    checkpointing: Checkpointing | None = None,
    on_epoch: Callable[[Epoch], None] = lambda _: None,
) -> FitResult:
    """Trains for `num_epochs` and keeps the parameters of the epoch that does best on validation.

    Args:
      apply_fn, tx: see `probe.training.steps`.
      params: the trainable leaves, nested dicts; the arrays are left as they are.
      train_batches: epoch, counted from 0 -> its batches; all of one shape.
      val_batches: -> the validation rows, the same at every call.
      seed: of dropout and augmentation; the order of the examples is the business of `train_batches`.
      frozen: the other leaves that `apply_fn` needs.
      model_state: batch statistics, or nothing.
      prepare, num_microbatches, average_decay: as in `make_train_step`; the average is what is judged and kept.
      patience: stop once so many epochs in a row were no better than the best before them.
      wanted: (logits [E, N, C] so far, labels [N]) -> epochs whose snapshots may be needed in the end.
      place, place_batch: put state and batches on devices (`probe.training.sharding`), also of several processes, which
        then all do this together, each with its part of the batches.
      checkpointing: save the run as it goes, and go on with one.
      on_epoch: told each line of the history as it is made.
    Raises: NumericalError if a loss is not finite, naming it, the step and the last good checkpoint;
      Interrupted at a signal, after a checkpoint was written; MismatchError if the checkpoint to go on with
      is of another run, CorruptError if it is damaged.
    """
    state = TrainState.create(params, tx, seed=seed, model_state=model_state, averaged=average_decay is not None)
    frozen = place({} if frozen is None else frozen)
    run = _Run(place(state), checkpointing)
    if checkpointing and checkpointing.resume:
        run.restore()
    train_step = make_train_step(
        apply_fn, tx, prepare=prepare, num_microbatches=num_microbatches, average_decay=average_decay
    )
    eval_step = make_eval_step(apply_fn)
    patience_with_signals = interrupt.patiently("saving a checkpoint") if checkpointing else contextlib.nullcontext()
    with patience_with_signals:
        while len(run.history) < num_epochs and not run.out_of_patience(patience):
            start, epoch = time.monotonic(), len(run.history)
            for batch in itertools.islice(train_batches(epoch), run.batches_done, None):
                batch = place_batch(dataclasses.replace(batch, epoch=np.int32(epoch)))
                run.state, sums = train_step(run.state, frozen, batch)
                run.count(sums)
            total = run.settle()
            judged, batches = (run.state.judged, frozen, run.state.model_state), run.heeding(val_batches())
            logits, labels = predict_logits(eval_step, *judged, batches, place_batch)
            val_accuracy, val_loss = score(logits, labels)
            run.check_finite("validation loss", val_loss, run.step)
            seconds = time.monotonic() - start
            train_loss, train_accuracy = float(total.nll), float(total.accuracy)
            line = Epoch(epoch + 1, run.step, train_loss, train_accuracy, val_loss, val_accuracy, seconds)
            run.end_epoch(line, logits, labels, wanted)
            on_epoch(line)
    logits, labels = np.stack(run.val_logits), run.val_labels
    best = distributed.agreed(best_candidate(logits, labels))
    return FitResult(run.history, best, run.snapshots, logits, labels)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


class _Run:
    """Where a run stands: all that the rest of it depends on, and all that a checkpoint holds."""

    def __init__(self, state: TrainState, checkpointing: Checkpointing | None) -> None:
        self.state = state
        self.step = 0  # state.step, without asking the device
        self.batches_done = 0  # of the epoch under way
        self.history: list[Epoch] = []
        self.val_logits: list[np.ndarray] = []
        self.val_labels = np.zeros(0, np.int32)
        self.snapshots: dict[int, Snapshot] = {}
        self._total: Metrics | None = None  # of the epoch under way
        self._ahead: list[Metrics] = []  # on the device: steps are dispatched without waiting for one another
        self._checkpointing = checkpointing
        self._saved_step = -1
        self._ear = distributed.Ear(_STEPS_AHEAD)

    def count(self, sums: Metrics) -> None:
        """Books a step."""
        self._ahead.append(sums)
        self.step += 1
        self.batches_done += 1
        if len(self._ahead) > _STEPS_AHEAD:
            jax.block_until_ready(self._ahead[-1 - _STEPS_AHEAD])
        if len(self._ahead) == _STEPS_BETWEEN_CHECKS:
            self.settle()
        if self._checkpointing and self.step % self._checkpointing.every_steps == 0:
            self.save()
        self.heed()

    def heed(self) -> None:
        """Raises: Interrupted where a signal asks to stop, once a checkpoint is written that goes on from here."""
        signum = self._ear.signal()
        if signum is None:
            return
        if self._checkpointing is None:
            raise interrupt.Interrupted(signum)
        if self.step > self._saved_step:
            self.save()
        last = checkpoints.find(self._checkpointing.folder, "last")
        raise interrupt.Interrupted(signum, f"{last} is kept; go on with --resume" if last else "")

    def heeding(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, for as long as no signal asks to stop."""
        for batch in batches:
            self.heed()
            yield batch

    def settle(self) -> Metrics:
        """Waits for all steps so far, checks their losses, and returns the sums over the epoch under way."""
        sums: list[Metrics] = jax.device_get(self._ahead)
        for index, step_sums in enumerate(sums):
            self.check_finite("training loss", step_sums.nll_sum, self.step - len(sums) + index + 1)
            self._total = step_sums if self._total is None else self._total.merge(step_sums)
        self._ahead.clear()
        assert self._total is not None, "an epoch has a batch or more"
        return self._total

    def check_finite(self, metric: str, value: float, step: int) -> None:
        if not np.isfinite(value):
            raise self._broken(f"{metric} is {value} at step {step}")

    def _broken(self, what: str) -> NumericalError:
        last = checkpoints.find(self._checkpointing.folder, "last") if self._checkpointing else None
        return NumericalError(
            f"{what}: lower the learning rates, or look for broken inputs"
            + (f". The last good checkpoint is {last}" if last else "")
        )

    def end_epoch(
        self,
        line: Epoch,
        logits: np.ndarray,
        labels: np.ndarray,
        wanted: Callable[[np.ndarray, np.ndarray], set[int]],
    ) -> None:
        epoch = len(self.history)
        self.history.append(line)
        self.val_logits.append(logits)
        self.val_labels = labels
        keep = distributed.agreed(wanted(np.stack(self.val_logits), labels))
        if epoch in keep:  # copies: the next step is given these arrays to overwrite
            self.snapshots[epoch] = Snapshot(*fetch((self.state.judged, self.state.model_state)))
        self.snapshots = {epoch: self.snapshots[epoch] for epoch in sorted(keep)}
        self.batches_done, self._total = 0, None
        if self._checkpointing:
            self.save()

    def out_of_patience(self, patience: int | None) -> bool:
        if patience is None or not self.history:
            return False
        best = distributed.agreed(best_candidate(np.stack(self.val_logits), self.val_labels))
        return len(self.history) - 1 - best >= patience

    def save(self) -> None:
        """Writes a checkpoint of all this."""
        assert self._checkpointing is not None
        if self._ahead:
            self.settle()  # a state with a broken loss behind it is not worth keeping
        if not fetch(_all_finite((self.state.params, self.state.judged, self.state.model_state))):
            raise self._broken(f"weights are not finite after step {self.step}")  # the loss shows it one step later
        record = {
            **self._checkpointing.record,
            "history": [dataclasses.asdict(line) for line in self.history],
            "batches_done": self.batches_done,
            "snapshots": sorted(self.snapshots),
        }
        at_best = not self.batches_done and len(self.history) - 1 in best_epoch(
            np.stack(self.val_logits), self.val_labels
        )
        tree = {
            "state": self.state,
            "snapshots": {str(epoch): (kept.params, kept.model_state) for epoch, kept in self.snapshots.items()},
            "total": {} if self._total is None else dataclasses.asdict(self._total),
            "val_logits": dict(enumerate(self.val_logits)),
            "val_labels": self.val_labels,
        }
        checkpoints.save(self._checkpointing.folder, self.step, tree, record, best=at_best)
        self._saved_step = self.step

    def restore(self) -> None:
        """Goes on from the last checkpoint, if there is one."""
        assert self._checkpointing is not None
        folder = self._checkpointing.folder
        if checkpoints.find(folder, "last") is None:
            return
        record, arrays = checkpoints.describe(folder, "last")
        snapshot = (self.state.judged, self.state.model_state)
        like = {
            "state": self.state,
            "snapshots": {
                str(epoch): jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), snapshot)
                for epoch in record["snapshots"]
            },
            "total": {path[6:]: array for path, array in arrays.items() if path.startswith("total/")},
            "val_logits": {epoch: arrays[f"val_logits/{epoch}"] for epoch in range(len(record["history"]))},
            "val_labels": arrays["val_labels"],
        }
        found = checkpoints.load(folder, "last", like, expect=self._checkpointing.record)
        tree = found.tree
        self.state, self.step, self._saved_step = tree["state"], found.step, found.step
        self.batches_done = record["batches_done"]
        self.history = [Epoch(**line) for line in record["history"]]
        self.val_logits, self.val_labels = list(tree["val_logits"].values()), tree["val_labels"]
        self.snapshots = {int(epoch): Snapshot(*kept) for epoch, kept in tree["snapshots"].items()}
        self._total = Metrics(**tree["total"]) if tree["total"] else None
