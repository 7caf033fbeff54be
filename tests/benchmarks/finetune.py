"""What a training step costs, beside inference and beside PyTorch where it can be imported.

    python -m tests.benchmarks.finetune [--quick] [--json FILE] [--rounds N]

CLIP ViT-B/32 of random weights, AdamW, batch 16, on what devices jax has. Peers, where torch and transformers can be
imported: CLIPVisionModel with a linear head, fused AdamW, float32 and bfloat16 autocast, eager and compiled. Each
program is a process of its own, with huge pages as `probe finetune` has them. Those of one group take two steps in
turn, the second of which is timed, so that whatever else the machine does slows all of them; who waits is stopped. The
memory is the most that the process held while it took steps, its libraries included.

The ratio is the best peer's median ÷ ours. The peer of a part that is trained is ours: inference where only the head
learns, the step that trains everything where the last two blocks learn from cached activations.
--quick takes 4 layers, batch 8 and 2 rounds, and leaves compiled peers out.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from probe.pages import huge_page_environment

NUM_CLASSES = 10
NUM_UNFROZEN = 2
STATUS = Path("/proc/self/status")

Work = Callable[[], Any]  # one step, waited for

# case -> what `ours` takes. Those of one group alternate; the peers of a case stand in `main`.
GROUPS: list[list[str]] = [
    ["everything, float32"],
    ["everything, bfloat16"],
    ["everything, float32, remat", "everything, bfloat16, remat"],
    ["inference, float32", "head, float32", "last 2 blocks, float32", "last 2 blocks, cached", "everything, float32"],
]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much work a step is."""

    num_layers: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    program: str
    median_s: float
    peak_mb: float | None = None
    ratio: float | None = None


def ours(case: str, size: Size) -> Work:
    """A step of ours; `case` is one of GROUPS."""
    import jax

    from probe.backbones import Backbone, ViTConfig, build_tower
    from probe.backbones.split import make_suffix
    from probe.heads import Classifier
    from probe.images import Preprocessing
    from probe.training import optim, steps
    from probe.training.full import classifier_variables, make_apply_fn
    from probe.training.rates import RateOptions, make_rules
    from probe.training.start import zero_head

    config = ViTConfig(projection_dim=None, num_hidden_layers=size.num_layers)
    side = config.image_size
    preprocessing = Preprocessing(
        resize=side, resample=3, crop=(side, side), rescale_factor=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    variables = jax.jit(build_tower(config).init)(jax.random.key(0), np.zeros((1, side, side, 3), np.float32))
    backbone = Backbone("random", None, config, variables, preprocessing)  # what a step costs is not in the weights
    params, model_state = classifier_variables(backbone, zero_head(backbone.width, NUM_CLASSES))
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 256, (size.batch_size, side, side, 3), np.uint8)
    arithmetic = {"bfloat16": "bfloat16" in case, "remat": "remat" in case}
    apply_fn = make_apply_fn(Classifier(NUM_CLASSES, backbone.module), preprocessing, **arithmetic)
    if case.startswith("inference"):
        evaluate = steps.make_eval_step(apply_fn)
        return lambda: evaluate(params, {}, model_state, inputs).block_until_ready()
    options = RateOptions(unfreeze_last=NUM_UNFROZEN if case.startswith("last") else None)
    if case.startswith("head"):
        options = RateOptions(freeze=("backbone",))
    if "cached" in case:
        suffix = make_suffix(config, size.num_layers - NUM_UNFROZEN)
        apply_fn = make_apply_fn(Classifier(NUM_CLASSES, suffix), None)
        tokens = 1 + (side // config.patch_size) ** 2
        inputs = rng.normal(size=(size.batch_size, tokens, config.hidden_size)).astype(np.float32)
    labels = optim.partition(params, make_rules(options, params))
    trainable, frozen = optim.split(params, labels)
    tx = optim.make_optimizer(optim.split(labels, labels)[0], num_steps=1000, warmup_steps=0, weight_decay=1e-4)
    step = steps.make_train_step(apply_fn, tx)
    state = steps.TrainState.create(trainable, tx, seed=0, model_state=model_state)
    rows = np.arange(size.batch_size)
    batch = steps.padded_batch(inputs, rows % NUM_CLASSES, size.batch_size, examples=rows)

    def work() -> None:
        nonlocal state
        state, sums = step(state, frozen, batch)
        jax.block_until_ready((state.params, sums))

    return work


def pytorch(case: str, size: Size, *, compiled: bool) -> Work:
    """A step of PyTorch's that trains everything, on the CPU."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(num_hidden_layers=size.num_layers)
    pixels = torch.rand(size.batch_size, 3, config.image_size, config.image_size)
    labels = torch.arange(size.batch_size) % NUM_CLASSES
    tower = CLIPVisionModel(config)
    head = torch.nn.Linear(config.hidden_size, NUM_CLASSES)
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1e-5, fused=True)
    forward = torch.compile(tower) if compiled else tower

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in case):
            logits = head(forward(pixel_values=pixels).pooler_output)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return work


def take_steps(case: str, program: str, size: Size) -> None:
    """A process of one program: two steps that warm up, then two for each line that it is sent; seconds of the second
    are answered, and at the end the most memory that it held since, in MB.

    Training takes its steps one after another. Of one that comes after a pause of seconds much may be what a virtual
    machine takes to get its memory back from its host."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print

    def answer(value: float) -> None:
        print(value, file=answers, flush=True)

    work = ours(case, size) if program == "probe" else pytorch(case, size, compiled=program == "torch.compile")
    work(), work()
    if STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")  # forgets what it held at most, by compiling perhaps
    answer(0)
    for _ in sys.stdin:
        work()
        started = time.perf_counter()
        work()
        answer(time.perf_counter() - started)
    peak = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    answer(int(peak[1]) / 1e3 if peak else float("nan"))


def measure(programs: list[tuple[str, str]], size: Size, rounds: int) -> list[Row]:
    """Medians of programs (case, program) that take steps in turn."""
    processes, seconds = [], []
    for case, program in programs:
        arguments = ["--worker", json.dumps([case, program, dataclasses.asdict(size)])]
        command = [sys.executable, "-m", "tests.benchmarks.finetune", *arguments]
        environment = {**os.environ, **huge_page_environment()}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        processes.append(process)
        process.stdout.readline()  # one compiles while no other runs
        process.send_signal(signal.SIGSTOP)
        seconds.append([])
    for _ in range(rounds):
        for process, taken in zip(processes, seconds, strict=True):
            process.send_signal(signal.SIGCONT)
            print("step", file=process.stdin, flush=True)
            taken.append(float(process.stdout.readline()))
            process.send_signal(signal.SIGSTOP)
    rows = []
    for (case, program), process, taken in zip(programs, processes, seconds, strict=True):
        process.send_signal(signal.SIGCONT)
        peak, _ = process.communicate()
        rows.append(Row(case, program, statistics.median(taken), float(peak)))
    return rows


def with_ratio(row: Row, rows: list[Row]) -> Row:
    """A row of ours beside the best of its peers among the rows of its group."""
    peer_case = {"head, float32": "inference, float32", "last 2 blocks, cached": "everything, float32"}.get(row.case)
    peers = [
        other.median_s
        for other in rows
        if (other.case == peer_case or (other.case == row.case and other.program != "probe"))
    ]
    return dataclasses.replace(row, ratio=min(peers) / row.median_s) if peers and row.program == "probe" else row


def describe_roofs(size: Size) -> str:
    """What the machine could do at best: the operations of a step, and how fast it multiplies."""
    import jax

    from probe.machine import matmul_rate

    width, tokens, patch = 768, 50, 32 * 32 * 3
    block = 12 * width * width * tokens + 2 * tokens * tokens * width  # multiplications: dense layers, attention
    forward = 2 * size.batch_size * (size.num_layers * block + (tokens - 1) * patch * width)
    step = 3 * forward - 2 * size.batch_size * (tokens - 1) * patch * width  # images get no gradient
    threads = f", {torch.get_num_threads()} threads of PyTorch" if (torch := _torch()) else ""
    lines = [f"{jax.devices()[0].device_kind}, {len(os.sched_getaffinity(0))} processors for jax{threads}"]
    for precision in ("float32", "bfloat16"):
        rate = matmul_rate(precision)
        floors = f"floor of a step {step / rate * 1e3:.0f} ms, of inference {forward / rate * 1e3:.0f} ms"
        lines.append(f"{precision}: {step / 1e9:.0f} GFLOP a step at {rate / 1e9:.0f} GFLOP/s: {floors}")
    return "\n".join(lines)


def _torch() -> Any:
    """PyTorch, or None where it or transformers cannot be imported."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return None
    return importlib.import_module("torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under 2 minutes")
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed of each program")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        case, program, size = json.loads(args.worker)
        take_steps(case, program, Size(**size))
        return
    size = Size(4, 8) if args.quick else Size(12, 16)  # two blocks must stay frozen
    rounds = 2 if args.quick else args.rounds
    peers = ("torch",) if args.quick else ("torch", "torch.compile")
    print(
        f"ViT-B/32 with {size.num_layers} layers, batch {size.batch_size}", describe_roofs(size), sep="\n", flush=True
    )
    table = []
    for number, group in enumerate(GROUPS):
        programs = [(case, "probe") for case in group]
        if number < 2 and _torch():
            programs += [(group[0], peer) for peer in peers]
        rows = measure(programs, size, rounds)
        for row in [with_ratio(row, rows) for row in rows]:
            ratio = f"  {row.ratio:.2f} × the best peer" if row.ratio is not None else ""
            speed = f"{row.median_s * 1e3:9.1f} ms  {size.batch_size / row.median_s:7.1f} images/s"
            print(f"{row.case:<28}{row.program:<14}{speed}  {row.peak_mb:8,.0f} MB{ratio}", flush=True)
            table.append(row)
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in table], indent=1))


if __name__ == "__main__":
    main()
