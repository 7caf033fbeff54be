"""One frozen dataclass per verb: validated where it is made, it is the command line, and is saved with runs.

Past this point nothing re-checks a value and nothing has a second default. Importing this module loads
neither jax nor numpy, so that `probe --help` answers at once.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from probe.errors import ConfigError

T = TypeVar("T")
_no_default_shown = arg(help_behavior_hint="")
Flag = Annotated[FlagCreatePairsOff[bool], _no_default_shown]  # `--overwrite`, never `--overwrite False` read as true
IfGiven = Annotated[T | None, _no_default_shown]  # None where it is not given; its text says what stands in then


def to_json(config: Any) -> dict[str, Any]:
    """The config as plain JSON values: paths as text, tuples as lists."""
    return dict(json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def _require(condition: bool, option: str, rule: str, value: object) -> None:
    if not condition:
        raise ConfigError(f"--{option} must be {rule}, got {value}")


def _positive(option: str, value: float) -> None:
    _require(0 < value < math.inf, option, "positive and finite", value)


def _not_negative(option: str, value: float) -> None:
    _require(0 <= value < math.inf, option, "zero or more, and finite", value)


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def _require_outside(out: Path, option: str, folder: Path | str | None) -> None:
    """A run folder is written whole, at the end, and then nothing may stand in its place."""
    if folder is not None and Path(folder).resolve().is_relative_to(out.resolve()):
        raise ConfigError(f"--{option} {folder} is within --out {out}, which is written whole at the end: use another")


def _check_logs(out: Path, tensorboard: Path | None, mlflow: str | None, wandb: Path | None) -> None:
    _require_outside(out, "tensorboard", tensorboard)
    _require_outside(out, "mlflow", None if mlflow is None or "://" in mlflow else mlflow)
    _require_outside(out, "wandb", wandb)


def _is_weight(item: str) -> bool:
    """Of NAME=WEIGHT, a weight that is positive and finite."""
    try:
        return "=" in item and 0 < float(item.rpartition("=")[2]) < math.inf
    except ValueError:
        return False


def _check_processes(
    distributed: bool, coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    given = {"coordinator": coordinator, "num-processes": num_processes, "process-id": process_id}
    for option, value in given.items():
        _require(distributed or value is None, option, "left out without --distributed", value)
    told = [option for option, value in given.items() if value is not None]
    if len(told) in (1, 2):
        missing = ", ".join(f"--{option}" for option in given if option not in told)
        raise ConfigError(f"--{told[0]} needs {missing} as well: a scheduler that jax knows tells all three")
    if coordinator is not None and num_processes is not None and process_id is not None:
        _require(":" in coordinator, "coordinator", "host:port", coordinator)
        _require(num_processes >= 1, "num-processes", "at least 1", num_processes)
        _require(0 <= process_id < num_processes, "process-id", f"from 0 to {num_processes - 1}", process_id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Run the backbone once over every image and cache the embeddings; run it again to continue or to update."""

    images: Annotated[Positional[Path], arg(metavar="IMAGES")]
    """Folders root/class/* or root/{train,val,test}/class/*; a .csv, .tsv, .jsonl or .parquet manifest; .tar shards
    in WebDataset layout; a .zip file; or what Hugging Face datasets saved. All but the last also as s3://... or gs://..."""
    backbone: str
    """Hub id (openai/clip-vit-base-patch32, or with @revision), a local folder in Hugging Face layout, or probe-tiny,
    the small CLIP that comes with this package."""
    out: Path
    """Cache folder to create or to continue."""
    precision: IfGiven[Literal["auto", "float32", "tf32", "bfloat16", "int8"]] = None
    """Arithmetic of the backbone, fixed by whoever creates the cache (if not given: what the cache says, or auto).
    auto: bfloat16 where that is faster and keeps a cosine of 0.9999 to float32 on some of the images; else float32.
    bfloat16, int8 and, on GPUs, tf32 round the operands of products; int8 moves embeddings most, and is never chosen
    for you."""
    batch_size: IfGiven[int] = None
    """Images per step, fixed likewise (if not given: what the cache says, or the fastest that fits, by a measurement,
    which may come out otherwise for another cache; to make the same bits again, give a number)."""
    decode: IfGiven[Literal["exact", "fast"]] = None
    """How JPEGs are decoded, fixed likewise (if not given: exact, or what the cache says). exact: as transformers, to
    the bit. fast: those over four times as large as the backbone reads at 1/2, 1/4 or 1/8 of their size."""
    dtype: IfGiven[Literal["float32", "float16"]] = None
    """Type that embeddings are stored in, fixed likewise (if not given: float32, or what the cache says)."""
    shard_rows: IfGiven[int] = None
    """Images per shard, fixed likewise: what a kill can cost (if not given: seconds of a CPU's work, else 16,384)."""
    on_error: Literal["skip", "fail"] = "skip"
    """What an unreadable image does: get no row and be reported, or end the run."""
    max_failures: IfGiven[int] = None
    """End the run, with exit code 4, once more images than this have failed (if not given: no limit)."""
    image_root: IfGiven[Path] = None
    """What a manifest's paths are relative to (if not given: the folder that it is in)."""
    path_column: IfGiven[str] = None
    """Column of a manifest that names the image (if not given: path or file_name)."""
    label_column: UseAppendAction[tuple[str, ...]] = ()
    """Column with the class or classes (if not given: label); several, by giving the option again, say yes or no."""
    split_column: IfGiven[str] = None
    """Column with train, val or test (if not given: split, where there is one)."""
    group_column: IfGiven[str] = None
    """Column of what must stay on one side of a split, as a patient (if not given: group, where there is one)."""
    retry_failed: Flag = False
    """Try again what failed in earlier runs; else only changed files are tried again."""
    verify_content: Flag = False
    """Read every file again, also where its size and time have not changed."""
    max_pixels: int = 100_000_000
    """Width x height above which an image is refused before it is decoded."""
    limit: IfGiven[int] = None
    """Embed only this many images, spread evenly over the source: to try something out."""
    dry_run: Flag = False
    """Write nothing; say how many images, bytes and minutes it would be, and how much disk."""
    shard_index: int = 0
    """Which of --num-shards processes this one is, from 0."""
    num_shards: int = 1
    """Processes, on any hosts that share the cache's file system, that divide the work between them."""
    num_workers: IfGiven[int] = None
    """Processes that decode images (if not given: one per core)."""
    engine: Literal["local", "ray"] = "local"
    """Who runs the shards: this process, or workers on a Ray cluster that see IMAGES and --out at the same paths."""
    ray_address: IfGiven[str] = None
    """A Ray cluster that runs already: auto, or host:port (if not given: RAY_ADDRESS, or one on this machine alone)."""
    workers: IfGiven[int] = None
    """Ray: workers at once (if not given: one a node, or as many as --gpus-per-worker leaves room for)."""
    gpus_per_worker: IfGiven[float] = None
    """Ray: GPUs, or a share of one, that each worker has to itself (if not given: none)."""
    decode_actors: IfGiven[int] = None
    """Ray: actors of one CPU that decode for each worker, on any host of the cluster (if not given: none, and a worker
    decodes on the CPUs beside it). For GPUs whose own hosts have too few CPUs to keep them busy."""
    quiet: Flag = False
    """No progress on stderr; errors and images that cannot be read are still told."""
    json: Flag = False
    """Print the summary to stdout as JSON."""

    def __post_init__(self) -> None:
        if self.engine == "ray":
            _require(self.num_shards == 1, "num-shards", "left out with --engine ray", self.num_shards)
            _require(not self.dry_run, "dry-run", "left out with --engine ray", self.dry_run)
        else:
            for option in ("ray_address", "workers", "gpus_per_worker", "decode_actors"):
                value = getattr(self, option)
                _require(value is None, option.replace("_", "-"), "left out without --engine ray", value)
        if self.workers is not None:
            _require(self.workers >= 1, "workers", "at least 1", self.workers)
        if self.decode_actors is not None:
            _require(self.decode_actors >= 1, "decode-actors", "at least 1", self.decode_actors)
        if self.gpus_per_worker is not None:
            _positive("gpus-per-worker", self.gpus_per_worker)
        if self.batch_size is not None:
            _require(self.batch_size >= 1, "batch-size", "at least 1", self.batch_size)
        if self.shard_rows is not None:
            _require(self.shard_rows >= 1, "shard-rows", "at least 1", self.shard_rows)
        if self.max_failures is not None:
            _require(self.max_failures >= 0, "max-failures", "at least 0", self.max_failures)
        if self.limit is not None:
            _require(self.limit >= 1, "limit", "at least 1", self.limit)
        if self.num_workers is not None:
            _require(self.num_workers >= 1, "num-workers", "at least 1", self.num_workers)
        _require(self.max_pixels >= 1, "max-pixels", "at least 1", self.max_pixels)
        _require(self.num_shards >= 1, "num-shards", "at least 1", self.num_shards)
        in_range = 0 <= self.shard_index < self.num_shards
        _require(in_range, "shard-index", f"from 0 to {self.num_shards - 1}", self.shard_index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheLsConfig:
    """Say what is in a cache: how it was made, classes, splits, failures, revisions and size."""

    cache: Annotated[Positional[Path], arg(metavar="CACHE")]
    """Cache folder."""
    json: Flag = False
    """Print the summary to stdout as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheVerifyConfig:
    """Read every byte of a cache and check it against its hashes; exit code 6 if anything is damaged."""

    cache: Annotated[Positional[Path], arg(metavar="CACHE")]
    """Cache folder."""
    deep: IfGiven[Path] = None
    """Also read every image of this source and compare it with the key it was embedded under."""
    repair: Flag = False
    """Remove damaged files; the same `probe embed` then makes them anew."""
    json: Flag = False
    """Print the summary to stdout as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheMergeConfig:
    """Join caches of equal fingerprint into a new one."""

    caches: Positional[tuple[Path, ...]]
    """Cache folders, two or more."""
    out: Path
    """Cache folder to create."""
    prefix: Flag = False
    """Put each cache's folder name before the names of its images, so that equal names do not clash."""
    json: Flag = False
    """Print the summary to stdout as JSON."""

    def __post_init__(self) -> None:
        _require(len(self.caches) >= 2, "caches", "two folders or more", len(self.caches))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachePruneConfig:
    """Remove what the newest revision of a cache does not use: embeddings of removed images, old plans."""

    cache: Annotated[Positional[Path], arg(metavar="CACHE")]
    """Cache folder; no `probe embed` may be running on it."""
    dry_run: Flag = False
    """Only say what would be removed."""
    json: Flag = False
    """Print the summary to stdout as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheRmConfig:
    """Remove a cache, and nothing else that lies in its folder."""

    cache: Annotated[Positional[Path], arg(metavar="CACHE")]
    """Cache folder; no `probe embed` may be running on it."""
    dry_run: Flag = False
    """Only say what would be removed."""
    json: Flag = False
    """Print the summary to stdout as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheExportConfig:
    """Write a cache as one plain file that other tools read."""

    cache: Annotated[Positional[Path], arg(metavar="CACHE")]
    """Cache folder."""
    single: Path
    """File to write: .h5, .npz or .parquet; it is built in memory."""
    overwrite: Flag = False
    """Replace what stands there."""
    json: Flag = False
    """Print the summary to stdout as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheImportConfig:
    """Make a cache of features that another program computed, for `fit-linear`."""

    features: Annotated[Positional[Path], arg(metavar="FEATURES")]
    """.npz, .npy (with --table), .parquet or .h5 file: embeddings, labels, and if there are, names, splits, groups."""
    out: Path
    """Cache folder to create."""
    table: IfGiven[Path] = None
    """CSV file with one line per row of a .npy: columns label, and if there are, name, split, group."""
    extractor: IfGiven[str] = None
    """What made the features, in your words (if not given: the file); only caches that agree in it can be merged."""
    json: Flag = False
    """Print the summary to stdout as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitLinearConfig:
    """Train a head on cached embeddings: the convex optimum of a linear head, or an MLP."""

    cache: Annotated[Positional[Path], arg(metavar="CACHE")]
    """Cache folder made by `probe embed`."""
    out: Path
    """Run folder to write."""
    overwrite: Flag = False
    """Replace what stands under --out."""
    head: Literal["linear", "mlp", "knn"] = "linear"
    """linear: the optimum of the L2-regularised cross-entropy; mlp: several Dense layers, trained with Adam; knn: a
    vote of the nearest training rows."""
    hidden: tuple[int, ...] = (1000, 256)
    """Widths of the MLP's hidden layers."""
    solver: Literal["lbfgs", "sklearn", "ridge"] = "lbfgs"
    """Who solves the linear head: ours in JAX, scikit-learn's LogisticRegression on the same objective (λ is chosen by
    ours all the same), or least squares in closed form, with exact leave-one-out answers."""
    views: tuple[Literal["pooler", "projected"], ...] = ("pooler",)
    """Which embeddings to fit; of several the best on validation."""
    scalings: tuple[Literal["standard", "l2", "none"], ...] = ("standard",)
    """standard: by the mean and deviation of the training rows; l2: rows of norm 1; none. All are folded into the
    saved head; of several the best on validation."""
    prior: Literal["none", "text"] = "none"
    """What λ pulls the weights to: none, which is 0, or text, the zero-shot head of the backbone's own text tower,
    times a strength that is chosen with λ (0, 1/4, 1/2 or 1). Needs --views projected --scalings l2."""
    prompts: tuple[str, ...] = ("a photo of {}", "a picture of {}", "{}")
    """With --prior text: texts with {} where a class's name goes; a class is what they say on average."""
    penalties: tuple[float, ...] = ()
    """Values of λ to choose from (if not given: 17 over 8 decades about the features' mean variance)."""
    criterion: Literal["accuracy", "nll"] = "accuracy"
    """What chooses (several labels a row: always nll)."""
    one_standard_error: Flag = False
    """Take the largest λ whose score is within a standard error of the best one's."""
    class_weights: tuple[str, ...] = ()
    """How much rows of a class count: balanced, or NAME=WEIGHT of one class and more."""
    shots: tuple[int, ...] = ()
    """Also fit heads to so many training rows of each class (1 2 4 8 16), and tell their accuracy."""
    learning_curve: Flag = False
    """Also fit heads to growing parts of train, and tell what more labels would give."""
    seeds: int = 5
    """Draws of rows for each number of shots and each point of the curve."""
    folds: int = 5
    """Parts of train, stratified, groups whole, each judged by a head that the others gave."""
    val_fraction: float = 0.2
    """Share of train held out, stratified, to choose the MLP's epoch where there is no validation split."""
    epochs: int = 20
    """Passes over the training rows (MLP)."""
    batch_size: int = 64
    """Rows per step (MLP)."""
    learning_rate: float = 1e-3
    """Step size of Adam (MLP)."""
    seed: int = 0
    """Seed of the validation split, the initial weights and the order of the rows."""
    no_refit: Flag = False
    """Keep the head that train alone gave; else train + a given validation split are fitted once λ is chosen."""
    max_memory: IfGiven[float] = None
    """GB that embeddings, and what a fit makes of them, may take (default: half of this machine's). Larger ones are
    read from the cache anew for each pass: the same optimum, later. Only --head linear with --solver lbfgs can, without
    --shots and --learning-curve; scikit-learn's baseline is left out."""
    distributed: Flag = False
    """This is one of several processes that fit together, each with its part of the rows; Slurm, Open MPI and
    Kubernetes tell which, and `probe launch` starts some on this machine. --max-memory is that of one of them."""
    coordinator: IfGiven[str] = None
    """Host:port of the first process (if not given, as the two below: what the scheduler says)."""
    num_processes: IfGiven[int] = None
    """How many processes there are."""
    process_id: IfGiven[int] = None
    """Which of them this one is, from 0."""
    tensorboard: IfGiven[Path] = None
    """Folder to write TensorBoard's event files to: the figures, and the curve of λ or of the epochs (needs the extra
    tensorboard)."""
    mlflow: IfGiven[str] = None
    """Folder whose mlflow.db gets them as a run of MLflow, with the report; or a tracking URI (needs the extra
    mlflow)."""
    wandb: IfGiven[Path] = None
    """Folder to write an offline run of Weights & Biases to, with the report (needs the extra wandb)."""
    bundle_backbone: Flag = False
    """Copy the backbone into the run folder, so that `probe predict` needs nothing else."""
    no_report: Flag = False
    """Do not write report.html into the run folder; `probe report` writes it later."""
    quiet: Flag = False
    """No progress on stderr; errors are still told."""
    json: Flag = False
    """Print metrics.json to stdout."""

    def __post_init__(self) -> None:
        _require(all(width >= 1 for width in self.hidden), "hidden", "widths of at least 1", self.hidden)
        if self.head == "mlp":
            _require(len(self.hidden) > 0, "hidden", "one width or more with --head mlp", self.hidden)
        _require(len(self.views) > 0, "views", "one view or more", self.views)
        _require(len(self.scalings) > 0, "scalings", "one scaling or more", self.scalings)
        self._refuse_what_the_head_ignores()
        _check_logs(self.out, self.tensorboard, self.mlflow, self.wandb)
        if (self.head, self.solver) not in (("linear", "lbfgs"), ("linear", "sklearn")):
            for option in ("views", "scalings"):
                chosen = getattr(self, option)
                _require(len(chosen) == 1, option, "a single one except with --solver lbfgs or sklearn", chosen)
        if self.prior == "text":
            view = self.views == ("projected",) and self.scalings == ("l2",)
            _require(view, "prior", "none except with --views projected --scalings l2", self.prior)
            alone = (self.head, self.solver) == ("linear", "lbfgs") and not (self.shots or self.learning_curve)
            needs = "none except with --head linear, --solver lbfgs, and none of --shots and --learning-curve"
            _require(alone, "prior", needs, self.prior)
            for prompt in self.prompts:
                _require("{}" in prompt, "prompts", "texts with {} where the class's name goes", repr(prompt))
        _require(
            all(0 <= p < math.inf for p in self.penalties), "penalties", "zero or more, and finite", self.penalties
        )
        if self.solver != "lbfgs":
            _require(all(self.penalties), "penalties", "above 0 except with lbfgs", self.penalties)
        if self.class_weights != ("balanced",):
            for item in self.class_weights:
                _require(_is_weight(item), "class-weights", "balanced, or NAME=WEIGHT with a weight above 0", item)
            names = [item.rpartition("=")[0] for item in self.class_weights]
            _require(len(set(names)) == len(names), "class-weights", "one weight of each class", names)
        _require(all(shots >= 1 for shots in self.shots), "shots", "numbers of at least 1", self.shots)
        _require(self.seed >= 0, "seed", "zero or more", self.seed)
        _require(self.seeds >= 1, "seeds", "at least 1", self.seeds)
        _require(self.folds >= 2, "folds", "at least 2", self.folds)
        _require(0 < self.val_fraction < 1, "val-fraction", "between 0 and 1", self.val_fraction)
        _require(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        _require(self.batch_size >= 1, "batch-size", "at least 1", self.batch_size)
        _positive("learning-rate", self.learning_rate)
        if self.max_memory is not None:
            _positive("max-memory", self.max_memory)
        _check_processes(self.distributed, self.coordinator, self.num_processes, self.process_id)
        if self.distributed:
            alone = (self.head, self.solver) == ("linear", "lbfgs") and not (self.shots or self.learning_curve)
            needs = "left out except with --head linear, --solver lbfgs, and none of --shots and --learning-curve"
            _require(alone, "distributed", needs, f"--head {self.head} --solver {self.solver}")

    def _refuse_what_the_head_ignores(self) -> None:
        """Raises ConfigError for options that are set and would change nothing."""
        kind = self.solver if self.head == "linear" else self.head
        for kinds, options in _OPTIONS_OF_HEADS.items():
            if kind in kinds.split():
                continue
            for option in options.split():
                default = next(field.default for field in dataclasses.fields(self) if field.name == option)
                if getattr(self, option) != default:
                    asked = f"--solver {kind}" if self.head == "linear" and kind != "lbfgs" else f"--head {self.head}"
                    of = ", ".join(f"--head {k}" if k in ("mlp", "knn") else f"--solver {k}" for k in kinds.split())
                    name = "--" + option.replace("_", "-")
                    raise ConfigError(f"{name} changes nothing with {asked}: it belongs to {of}. Leave it out.")


_OPTIONS_OF_HEADS = {  # `FitLinearConfig`: which solvers of the linear head, and which other heads, heed an option
    "mlp": "hidden val_fraction epochs batch_size learning_rate",
    "lbfgs sklearn": "shots learning_curve folds",
    "lbfgs sklearn ridge": "solver penalties class_weights",
    "lbfgs sklearn ridge mlp": "scalings",
    "lbfgs sklearn ridge knn": "criterion one_standard_error no_refit",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Train backbone and head end to end, parts at their own rates."""

    images: Annotated[Positional[Path], arg(metavar="IMAGES")]
    """Folders root/class/* or root/{train,val,test}/class/*, a manifest, tar shards, or what else `embed` takes."""
    backbone: str
    """Hub id, optionally @revision, or a local folder in Hugging Face layout."""
    out: Path
    """Run folder to write."""
    overwrite: Flag = False
    """Replace what stands under --out."""
    init: str = "probe"
    """Where the head starts: probe (solved on the training embeddings first), text (the classes' names, by the
    backbone's own text tower), zeros, or a `fit-linear` run."""
    prompts: tuple[str, ...] = ("a photo of {}", "a picture of {}", "{}")
    """With --init text: texts with {} where a class's name goes; a class is what they say on average."""
    cache: IfGiven[Path] = None
    """Cache made by `probe embed`, to take embeddings from for --init probe and text."""
    wise: str = "best"
    """How far from the start to the end the weights are kept: best on validation, a share of 0 to 1, or off (1)."""
    keep: Literal["best", "finetuned"] = "best"
    """What is saved: the probe unless fine-tuning was better beyond chance, or the fine-tuned one in any case."""
    epochs: int = 5
    """Passes over the training images."""
    batch_size: int = 16
    """Images per step."""
    backbone_lr: IfGiven[float] = None
    """Peak step size of the backbone (if not given: 1e-5); 0 freezes it."""
    head_lr: IfGiven[float] = None
    """Peak step size of the head (if not given: 1e-3)."""
    freeze: UseAppendAction[tuple[str, ...]] = ()
    """Parameter paths to freeze, by prefix or pattern: backbone, backbone/encoder/layers_0, **/bias."""
    layer_decay: IfGiven[float] = None
    """Step size of each block of the backbone as a share of that of the block above it."""
    unfreeze_last: IfGiven[int] = None
    """Train the last K blocks of the backbone and freeze those below."""
    rates: UseAppendAction[tuple[str, ...]] = ()
    """A rule pattern=rate or pattern=frozen, the first match wins; instead of the options above, not beside them."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """Decoupled weight decay, not on biases and norms."""
    clip_norm: IfGiven[float] = None
    """Longest gradient, over all parts together (if not given: no limit)."""
    accumulate: int = 1
    """Parts into which a batch is cut, to need the memory of one; the step is that of the whole batch."""
    average: IfGiven[float] = None
    """Decay of an exponential moving average of the weights, which is then what is judged and kept."""
    patience: IfGiven[int] = None
    """Stop once this many epochs in a row were no better on validation (if not given: run them all)."""
    warmup_fraction: float = 0.1
    """Share of the steps over which the rates rise from 0; then they fall to 0 as a cosine."""
    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Random resized crops: least and most share of the area (1 1: none)."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Random resized crops: least and most width : height."""
    flip: float = 0.0
    """Probability of a mirror image."""
    brightness: float = 0.0
    """Colour jitter: factors of 1 ± this."""
    contrast: float = 0.0
    """Colour jitter: factors of 1 ± this."""
    saturation: float = 0.0
    """Colour jitter: factors of 1 ± this."""
    hue: float = 0.0
    """Colour jitter: turns of up to this share of the colour circle, at most 0.5."""
    rand_ops: int = 0
    """RandAugment: operations per picture."""
    rand_magnitude: float = 9.0
    """RandAugment: strength, 0 to 10."""
    mixup: float = 0.0
    """Mixup: α of the Beta distribution (0: off)."""
    cutmix: float = 0.0
    """CutMix: α of the Beta distribution (0: off)."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all classes."""
    image_size: IfGiven[int] = None
    """Height and width of the images; position embeddings are interpolated (if not given: the checkpoint's)."""
    views: IfGiven[int] = None
    """Augmented pictures of each training image, epoch after epoch in turn (if not given: new ones in every epoch)."""
    cache_prefix: str = "auto"
    """Compute the frozen blocks below the first one that learns once, and keep what they give on the disk: auto, where
    it pays, and beside --out until the run ends; off; or a folder, where later runs find it again."""
    train_batchnorm: Flag = False
    """Normalise by the statistics of the batch and update the running ones (if not given: the pretrained ones stay)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of training; weights, their updates and all evaluation are float32."""
    remat: Flag = False
    """Keep the results of matrix products only and compute the rest again in the backward pass: less memory."""
    fsdp: Flag = False
    """With several devices: divide weights and optimizer state over them instead of copying them."""
    distributed: Flag = False
    """This is one of several processes that train together, each with its part of the images; Slurm, Open MPI and
    Kubernetes tell which, and `probe launch` starts some on this machine."""
    coordinator: IfGiven[str] = None
    """Host:port of the first process (if not given, as the two below: what the scheduler says)."""
    num_processes: IfGiven[int] = None
    """How many processes there are."""
    process_id: IfGiven[int] = None
    """Which of them this one is, from 0."""
    checkpoint_every: int = 500
    """Steps between checkpoints, besides those after each epoch; 0: none at all."""
    tensorboard: IfGiven[Path] = None
    """Folder to write TensorBoard's event files to, epoch by epoch (needs the extra tensorboard)."""
    mlflow: IfGiven[str] = None
    """Folder whose mlflow.db gets a run of MLflow, with the report; or a tracking URI (needs the extra mlflow)."""
    wandb: IfGiven[Path] = None
    """Folder to write an offline run of Weights & Biases to, with the report (needs the extra wandb)."""
    resume: Flag = False
    """Go on with a run that was cut off, to the bit."""
    val_fraction: float = 0.2
    """Share of train held out, stratified, to choose the epoch where there is no validation split."""
    bundle_backbone: Flag = False
    """Copy the backbone into the run folder even if it was not changed."""
    no_report: Flag = False
    """Do not write report.html into the run folder; `probe report` writes it later."""
    image_root: IfGiven[Path] = None
    """What a manifest's paths are relative to (if not given: the folder that it is in)."""
    path_column: IfGiven[str] = None
    """Column of a manifest that names the image (if not given: path or file_name)."""
    label_column: UseAppendAction[tuple[str, ...]] = ()
    """Column with the class or classes (if not given: label); several, by giving the option again, say yes or no."""
    split_column: IfGiven[str] = None
    """Column with train, val or test (if not given: split, where there is one)."""
    group_column: IfGiven[str] = None
    """Column of what must stay on one side of a split, as a patient (if not given: group, where there is one)."""
    on_error: Literal["skip", "fail"] = "skip"
    """What an unreadable image does: be left out and reported, or end the run."""
    num_workers: IfGiven[int] = None
    """Processes that decode images (if not given: one per core)."""
    seed: int = 0
    """Seed of the validation split, the order of the images and dropout."""
    quiet: Flag = False
    """No progress on stderr; errors and images that cannot be read are still told."""
    json: Flag = False
    """Print metrics.json to stdout."""

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", "zero or more", self.seed)
        _require(self.epochs >= 1, "epochs", "at least 1", self.epochs)
        _require(self.batch_size >= 1, "batch-size", "at least 1", self.batch_size)
        if self.backbone_lr is not None:
            _not_negative("backbone-lr", self.backbone_lr)
        if self.head_lr is not None:
            _positive("head-lr", self.head_lr)
        if self.layer_decay is not None:
            _require(0 < self.layer_decay <= 1, "layer-decay", "above 0 and at most 1", self.layer_decay)
        if self.unfreeze_last is not None:
            _require(self.unfreeze_last >= 1, "unfreeze-last", "at least 1", self.unfreeze_last)
        if self.wise not in ("best", "off"):
            _require(_is_share(self.wise), "wise", "best, off, or a number from 0 to 1", self.wise)
        _require(0 <= self.momentum < 1, "momentum", "at least 0 and below 1", self.momentum)
        _not_negative("weight-decay", self.weight_decay)
        if self.clip_norm is not None:
            _positive("clip-norm", self.clip_norm)
        _require(self.accumulate >= 1, "accumulate", "at least 1", self.accumulate)
        divides = self.batch_size % self.accumulate == 0
        _require(divides, "accumulate", f"a divisor of --batch-size {self.batch_size}", self.accumulate)
        if self.average is not None:
            _require(0 < self.average < 1, "average", "between 0 and 1", self.average)
        if self.patience is not None:
            _require(self.patience >= 1, "patience", "at least 1", self.patience)
        if self.image_size is not None:
            _require(self.image_size >= 1, "image-size", "at least 1", self.image_size)
        if self.init == "text":
            for prompt in self.prompts:
                _require("{}" in prompt, "prompts", "texts with {} where the class's name goes", repr(prompt))
        if _is_share(self.wise):
            knows_something = self.init != "zeros"  # else there is nothing to gain between start and end
            _require(knows_something, "wise", "best or off with --init zeros", self.wise)
        if self.cache is not None:
            _require(
                self.init in ("probe", "text"),
                "cache",
                f"left out with --init {self.init}, which reads none",
                self.cache,
            )
        if self.resume:
            _require(self.checkpoint_every > 0, "checkpoint-every", "above 0 with --resume", self.checkpoint_every)
        if self.views is not None:
            _require(self.views >= 1, "views", "at least 1", self.views)
        _require(self.cache_prefix != "", "cache-prefix", "auto, off or a folder", "nothing")
        _require_outside(self.out, "cache-prefix", None if self.cache_prefix in ("auto", "off") else self.cache_prefix)
        _check_logs(self.out, self.tensorboard, self.mlflow, self.wandb)
        _require(self.checkpoint_every >= 0, "checkpoint-every", "0 or more", self.checkpoint_every)
        _require(0 <= self.warmup_fraction < 1, "warmup-fraction", "at least 0 and below 1", self.warmup_fraction)
        _require(0 < self.val_fraction < 1, "val-fraction", "between 0 and 1", self.val_fraction)
        if self.num_workers is not None:
            _require(self.num_workers >= 1, "num-workers", "at least 1", self.num_workers)
        _check_processes(self.distributed, self.coordinator, self.num_processes, self.process_id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """Run finetune or fit-linear as several processes of this machine; if one dies, go on from the last checkpoint."""

    command: Annotated[Positional[tuple[str, ...]], arg(metavar="-- VERB ...", help_behavior_hint="(required)")]
    """At the end, behind two dashes: finetune or fit-linear and its options. Its output is that of the first process;
    what others say as they fail goes to stderr behind their number."""
    n: int
    """How many processes; of a machine's GPUs each takes one."""
    max_restarts: int = 3
    """How often to go on after a process died; errors that would come again, as of options or images, end it."""
    json: Flag = False
    """Print the number of processes and the restarts to stdout as JSON, after what the verb prints."""

    def __post_init__(self) -> None:
        verb = self.command[0] if self.command else "nothing"
        _require(verb in ("finetune", "fit-linear"), "-", "followed by finetune or fit-linear", verb)
        _require(self.n >= 1, "n", "at least 1", self.n)
        _require(self.max_restarts >= 0, "max-restarts", "zero or more", self.max_restarts)
        words = [word.replace("_", "-").partition("=")[0] for word in self.command]
        own = [word for word in words if word in _OF_LAUNCH]
        if own:
            raise ConfigError(f"{own[0]} is what `probe launch` gives to each process: leave it out")


_OF_LAUNCH = ("--distributed", "--coordinator", "--num-processes", "--process-id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroShotConfig:
    """Classify images by the names of their classes alone, with CLIP's text tower."""

    images: Annotated[Positional[Path], arg(metavar="IMAGES")]
    """Labelled images, as `embed` takes them; the names of their classes are what is looked for."""
    backbone: str
    """A whole CLIP with its tokenizer: hub id, optionally @revision, a local folder in Hugging Face layout, or
    probe-tiny."""
    prompts: tuple[str, ...] = ("a photo of {}", "a picture of {}", "{}")
    """Texts with {} where a class's name goes; a class is what they say on average."""
    out: IfGiven[Path] = None
    """Run folder to write, for `predict` and `compare` (if not given: the figures are printed and nothing is saved)."""
    overwrite: Flag = False
    """Replace what stands under --out."""
    batch_size: int = 32
    """Images per step."""
    on_error: Literal["skip", "fail"] = "skip"
    """What an unreadable image does: be left out and reported, or end the run."""
    num_workers: IfGiven[int] = None
    """Processes that decode images (if not given: one per core)."""
    quiet: Flag = False
    """No progress on stderr; errors and images that cannot be read are still told."""
    json: Flag = False
    """Print metrics.json to stdout."""

    def __post_init__(self) -> None:
        _require(len(self.prompts) > 0, "prompts", "one text or more", self.prompts)
        for prompt in self.prompts:
            _require("{}" in prompt, "prompts", "texts with {} where the class's name goes", repr(prompt))
        _require(self.batch_size >= 1, "batch-size", "at least 1", self.batch_size)
        if self.num_workers is not None:
            _require(self.num_workers >= 1, "num-workers", "at least 1", self.num_workers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Classify images with what `fit-linear` or `finetune` saved."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder."""
    images: Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGES [IMAGES ...]", help_behavior_hint="(required)")]
    """Images, and folders or archives of them, searched through all their subfolders; paths are shown relative to
    the one folder that is given, or as given where there are several."""
    out: IfGiven[Path] = None
    """CSV file to write: path, predicted class, probability of each class (if not given: stdout)."""
    overwrite: Flag = False
    """Replace what stands under --out."""
    backbone: IfGiven[str] = None
    """Where the backbone is now, if it has moved since the run was made."""
    batch_size: int = 32
    """Images per step."""
    on_error: Literal["skip", "fail"] = "skip"
    """What an unreadable image does: be left out and reported, or end the run."""
    num_workers: IfGiven[int] = None
    """Processes that decode images (if not given: one per core)."""
    quiet: Flag = False
    """No progress on stderr; errors and images that cannot be read are still told."""
    json: Flag = False
    """Print the predictions to stdout as JSON."""

    def __post_init__(self) -> None:
        if not self.images:
            raise ConfigError("no IMAGES given: name images, or a folder of them")
        _require(self.batch_size >= 1, "batch-size", "at least 1", self.batch_size)
        if self.num_workers is not None:
            _require(self.num_workers >= 1, "num-workers", "at least 1", self.num_workers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a run in a form that other programs read: ONNX, StableHLO, safetensors or Hugging Face."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder."""
    format: Literal["onnx", "jax", "safetensors", "hub"]
    """onnx: one file, images or embeddings in, logits and probabilities out. jax: a folder with the program of
    jax.export, for CPU, GPU and TPU. safetensors: one file of weights. hub: a Hugging Face folder with a model card."""
    out: Annotated[IfGiven[Path], arg(aliases=["--output"])] = None
    """File or folder to write (if not given: beside the run folder, under its name)."""
    part: Literal["whole", "head"] = "whole"
    """whole: backbone and head, which takes images; head: the head alone, which takes embeddings."""
    overwrite: Flag = False
    """Replace what stands under --out."""
    backbone: IfGiven[str] = None
    """Where the backbone is now, if it has moved since the run was made."""
    json: Flag = False
    """Print what was written to stdout as JSON."""

    def __post_init__(self) -> None:
        if self.format == "hub":
            _require(self.part == "whole", "part", "whole with --format hub", self.part)
        if self.part == "head":
            _require(self.backbone is None, "backbone", "left out with --part head, which needs none", self.backbone)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Open a page on this machine that classifies the images dropped on it; POST /predict does it for programs."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is reached from this machine alone. There is no password."""
    port: int = 8765
    """Port to listen on; 0 takes any that is free."""
    allow_host: tuple[str, ...] = ()
    """Further names that this server may be called by, as they stand in a Host header (localhost and --host may)."""
    images: IfGiven[Path] = None
    """Where the training images are now, if they have moved since the run was made."""
    cache: IfGiven[Path] = None
    """Cache with the embeddings of the training images, if it has moved, or if fine-tuning changed the backbone."""
    backbone: IfGiven[str] = None
    """Where the backbone is now, if it has moved since the run was made."""
    nearest: int = 6
    """Training images that are shown with an answer."""
    batch_size: IfGiven[int] = None
    """Images per step, from as many requests; a step takes as long with fewer (if not given: 32; on a CPU 1, or 8 where
    that takes at most twice as long)."""
    queue: int = 64
    """Images that may be under way at once; more are refused with status 503."""
    max_bytes: int = 32_000_000
    """Bytes of a request above which it is refused with status 413."""
    max_pixels: int = 100_000_000
    """Width x height above which an image is refused before it is decoded."""
    num_workers: IfGiven[int] = None
    """Processes that decode images (if not given: one per core)."""
    json: Flag = False
    """Print address and, at the end, totals to stdout as JSON, one line each."""

    def __post_init__(self) -> None:
        _require(0 <= self.port <= 65535, "port", "from 0 to 65535", self.port)
        if self.host in ("", "0.0.0.0", "::"):  # noqa: S104  a name in a Host header it is not
            _require(bool(self.allow_host), "allow-host", f"given with --host {self.host!r}", self.allow_host)
        if self.batch_size is not None:
            _require(self.batch_size >= 1, "batch-size", "at least 1", self.batch_size)
        if self.num_workers is not None:
            _require(self.num_workers >= 1, "num-workers", "at least 1", self.num_workers)
        _require(self.nearest >= 1, "nearest", "at least 1", self.nearest)
        _require(self.queue >= 1, "queue", "at least 1", self.queue)
        _require(self.max_bytes >= 1, "max-bytes", "at least 1", self.max_bytes)
        _require(self.max_pixels >= 1, "max-pixels", "at least 1", self.max_pixels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Say which of two runs is better on the same rows, and whether that is more than chance."""

    run_a: Annotated[Positional[Path], arg(metavar="RUN_A")]
    """Run folder A."""
    run_b: Annotated[Positional[Path], arg(metavar="RUN_B")]
    """Run folder B; differences are B - A."""
    split: Literal["test", "val", "train"] = "test"
    """Rows to compare on; those of train were answered out of fold, where the runs have such answers."""
    seed: int = 0
    """Seed of the bootstrap."""
    json: Flag = False
    """Print the comparison to stdout as JSON, with every flipped image."""

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", "zero or more", self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write report.html of a run: how good it is, where it fails, and what to do next, in one file."""

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder."""
    out: IfGiven[Path] = None
    """File to write (if not given: report.html in the run folder)."""
    images: IfGiven[Path] = None
    """Where the images are now, if they have moved since the run was made."""
    cache: IfGiven[Path] = None
    """Cache with the embeddings for the map (if not given: what fine-tuning and zero-shot runs keep of theirs, else the
    cache that the run was made from)."""
    map: Literal["pca", "umap"] = "pca"
    """How embeddings are laid out in the plane; umap needs the package umap-learn."""
    num_workers: IfGiven[int] = None
    """Processes that decode images (if not given: one per core)."""
    json: Flag = False
    """Print what was written to stdout as JSON."""

    def __post_init__(self) -> None:
        if self.num_workers is not None:
            _require(self.num_workers >= 1, "num-workers", "at least 1", self.num_workers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Measure this machine: what it can do, what bounds `embed` on it, and what would make it faster."""

    backbone: IfGiven[str] = None
    """Hub id or folder: how many images a second the machine allows for it, and what each precision changes."""
    images: IfGiven[Path] = None
    """Folder, archive or manifest of images to measure with (if not given: two photos that scikit-learn brings)."""
    json: Flag = False
    """Print the measurements to stdout as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Say what is likely wrong with the data: duplicates across splits, wrong labels, outliers, leaking groups."""

    cache: Annotated[Positional[Path], arg(metavar="CACHE")]
    """Cache folder."""
    run: IfGiven[Path] = None
    """Run whose answers judge the labels, and whose report gets the findings (if not given: a head is fitted now)."""
    out: IfGiven[Path] = None
    """Folder for audit.csv and audit.json (if not given: the run's, or the folder audit)."""
    overwrite: Flag = False
    """Replace an earlier audit."""
    fix: IfGiven[Path] = None
    """Also write a CSV manifest of the images without the rows marked drop, for `probe embed`."""
    images: IfGiven[Path] = None
    """Where the images are now, if they have moved."""
    seed: int = 0
    """Seed of the folds."""
    json: Flag = False
    """Print the findings to stdout as JSON."""

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", "zero or more", self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Show the whole program at work on sample images, without a download, in a minute or two."""

    out: Path = Path("probe-demo")
    """New folder to work in."""
    json: Flag = False
    """Print the table at the end to stdout as JSON; what the steps say goes there before it."""
