"""Makes probe-tiny from nothing but registry packages: one command, which may be killed and run again.

    python -m data.pretrain WORK [--steps 11000] [--decay-steps 2750] [--install]

In WORK: archives/ (what was fetched), pairs/ (every picture drawn once), tokenizer/, train/ (checkpoint and log),
probe-tiny/ (the model) and metrics.json. Each part that is there already is not made again; training goes on from its
last checkpoint. To end a run earlier, stop it, and run it again with the --steps that it should have. --install copies
the model into the package, makes the sample images, measures the transfer and writes the figures into README.md.
"""

import argparse
import json
import shutil
from pathlib import Path

from data import make_samples
from data.pretrain import report, transfer
from data.pretrain.batches import Recipe
from data.pretrain.captions import load_tokenizer, save_tokenizer, train_tokenizer
from data.pretrain.evaluate import evaluate, loss_curve
from data.pretrain.export import export
from data.pretrain.fetch import archive, packages
from data.pretrain.pairs import make_pairs
from data.pretrain.train import num_parameters, train

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / "probe" / "models" / "probe-tiny"


def main() -> None:
    defaults = Recipe()
    parser = argparse.ArgumentParser(prog="python -m data.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=defaults.num_steps)
    parser.add_argument("--decay-steps", type=int, default=defaults.decay_steps)
    parser.add_argument("--install", action="store_true")
    options = parser.parse_args()
    work: Path = options.work
    recipe = Recipe(num_steps=options.steps, decay_steps=options.decay_steps)
    for package in packages():
        archive(package, work / "archives")
    pairs = make_pairs(work / "archives", work / "pairs")
    if not (work / "tokenizer").exists():
        save_tokenizer(train_tokenizer(pairs.concepts), work / "tokenizer")
    tokenizer = load_tokenizer(work / "tokenizer")
    params = train(work, recipe)
    model = work / "probe-tiny"
    shutil.rmtree(model, ignore_errors=True)
    export(params, tokenizer, model)
    curve = loss_curve(work / "train" / "log.jsonl")
    metrics = {
        "parameters": num_parameters(params),
        "pictures": int((~pairs.unseen).sum()),
        "batch_size": recipe.batch_size,
        "curve": curve,
        "retrieval": evaluate(pairs, model),
    }
    (work / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    if options.install:
        shutil.rmtree(INSTALLED, ignore_errors=True)
        shutil.copytree(model, INSTALLED)
        make_samples.main(work / "archives")
        metrics["transfer"] = transfer.measure()
        report.write(metrics)
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
