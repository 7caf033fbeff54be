"""What a training step costs, beside inference and beside PyTorch where it can be imported.

    python -m tests.benchmarks.finetune [--quick] [--json FILE]

CLIP ViT-B/32 of random weights, AdamW, batch 16, on what devices jax has: the whole classifier in float32 and
bfloat16, the backbone frozen (beside inference), its last two blocks trained. Peers, where torch and transformers can
be imported: CLIPVisionModel with a linear head, fused AdamW, float32 and bfloat16 autocast, eager and compiled.
--quick takes 2 layers, batch 8 and 2 repeats, and leaves compiled peers out. The memory is the compiled program's
own account: arguments, results and temporaries at their peak; of PyTorch it is not known.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from probe.backbones import Backbone, ViTConfig, build_tower
from probe.heads import Classifier
from probe.images import Preprocessing
from probe.training import optim, steps
from probe.training.full import classifier_variables, make_apply_fn
from probe.training.rates import RateOptions, make_rules
from probe.training.start import zero_head

NUM_CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; ratio: the best peer's median ÷ ours on the same work."""

    case: str
    program: str
    median_s: float
    peak_mb: float | None = None
    ratio: float | None = None


def median_seconds(work: Callable[[], Any], repeats: int) -> float:
    """Of calls after two that warm up; `work` must wait for its result."""
    work(), work()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def make_backbone(config: ViTConfig) -> Backbone:
    """A tower of random weights: what a step costs does not depend on them."""
    size = config.image_size
    preprocessing = Preprocessing(
        resize=size, resample=3, crop=(size, size), rescale_factor=1 / 255, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    pixels = np.zeros((1, size, size, 3), np.float32)
    variables = jax.jit(build_tower(config).init)(jax.random.key(0), pixels)
    return Backbone("random", None, config, variables, preprocessing)


def measure_ours(backbone: Backbone, batch_size: int, repeats: int) -> list[Row]:
    size = backbone.preprocessing.image_size
    images = np.random.default_rng(0).integers(0, 256, (batch_size, *size, 3), np.uint8)
    batch = steps.padded_batch(images, np.arange(batch_size) % NUM_CLASSES, batch_size, examples=np.arange(batch_size))
    params, model_state = classifier_variables(backbone, zero_head(backbone.width, NUM_CLASSES))
    classifier = Classifier(NUM_CLASSES, backbone.module)
    rows = []

    def measure(case: str, options: RateOptions, **arithmetic: bool) -> None:
        labels = optim.partition(params, make_rules(options, params))
        trainable, frozen = optim.split(params, labels)
        tx = optim.make_optimizer(optim.split(labels, labels)[0], num_steps=1000, warmup_steps=0, weight_decay=1e-4)
        step = steps.make_train_step(make_apply_fn(classifier, backbone.preprocessing, **arithmetic), tx)
        state = steps.TrainState.create(trainable, tx, seed=0, model_state=model_state)
        memory = step.lower(state, frozen, batch).compile().memory_analysis()  # type: ignore[attr-defined]
        sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak_mb = (sizes + memory.temp_size_in_bytes) / 1e6

        def work() -> None:
            nonlocal state
            state, sums = step(state, frozen, batch)
            jax.block_until_ready((state.params, sums))

        rows.append(Row(case, "probe", median_seconds(work, repeats), peak_mb))

    measure("everything, float32", RateOptions())
    measure("everything, float32, remat", RateOptions(), remat=True)
    measure("everything, bfloat16", RateOptions(), bfloat16=True)
    measure("last 2 blocks, float32", RateOptions(unfreeze_last=2))
    measure("head, float32", RateOptions(freeze=("backbone",)))
    evaluate = steps.make_eval_step(make_apply_fn(classifier, backbone.preprocessing))
    inference = median_seconds(lambda: evaluate(params, {}, model_state, images).block_until_ready(), repeats)
    rows.append(Row("inference, float32", "probe", inference))
    return rows


def measure_torch(config: ViTConfig, batch_size: int, repeats: int, programs: tuple[str, ...]) -> list[Row]:
    """The same work by PyTorch on the CPU; nothing where it cannot be imported."""
    try:
        import torch
        from transformers import CLIPVisionConfig, CLIPVisionModel
    except ImportError:
        return []
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    fields = {name: getattr(config, name) for name in names}
    pixels = torch.rand(batch_size, 3, config.image_size, config.image_size)
    labels = torch.arange(batch_size) % NUM_CLASSES

    def make_work(dtype: str, compiled: bool) -> Callable[[], None]:
        tower = CLIPVisionModel(CLIPVisionConfig(**fields))
        head = torch.nn.Linear(config.hidden_size, NUM_CLASSES)
        optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=1e-5, fused=True)
        forward = torch.compile(tower) if compiled else tower

        def work() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = head(forward(pixel_values=pixels).pooler_output)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return work

    return [
        Row(f"everything, {dtype}", program, median_seconds(make_work(dtype, program == "torch.compile"), repeats))
        for dtype in ("float32", "bfloat16")
        for program in programs
    ]


def with_ratios(ours: list[Row], peers: list[Row]) -> list[Row]:
    """Our rows, each beside the best peer of its case, and those of a part beside the whole step and inference."""
    best: dict[str, float] = {}
    for row in peers:
        best[row.case] = min(row.median_s, best.get(row.case, row.median_s))
    return [
        dataclasses.replace(row, ratio=best[row.case] / row.median_s) if row.case in best else row for row in ours
    ] + peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes, under 2 minutes")
    parser.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args()
    config = ViTConfig(projection_dim=None, num_hidden_layers=2 if args.quick else 12)
    batch_size, repeats = (8, 2) if args.quick else (16, 7)
    programs = ("torch",) if args.quick else ("torch", "torch.compile")
    ours = measure_ours(make_backbone(config), batch_size, repeats)
    rows = with_ratios(ours, measure_torch(config, batch_size, repeats, programs))
    print(f"ViT-B/32 with {config.num_hidden_layers} layers, batch {batch_size}, {jax.devices()[0].device_kind}")
    for row in rows:
        peak = f"{row.peak_mb:8,.0f} MB" if row.peak_mb is not None else " " * 11
        ratio = f"  {row.ratio:.2f} × the best peer" if row.ratio is not None else ""
        speed = f"{row.median_s * 1e3:9.1f} ms  {batch_size / row.median_s:7.1f} images/s"
        print(f"{row.case:<28}{row.program:<14}{speed}  {peak}{ratio}")
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
