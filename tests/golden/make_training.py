"""Makes tests/golden/training/: three steps of SGD on a tiny CLIP classifier, as PyTorch does them.

Run where PyTorch and transformers 5 are installed, from the root of the repository:

    python -m tests.golden.make_training

The folder is the checkpoint before the first step (config.json, model.safetensors, preprocessor_config.json),
with one file for each way to train; there is a linear head on the pooler output:

    sgd.npz              three classes, cross-entropy, plain SGD
    momentum-binary.npz  two classes, one logit, SGD with momentum

Each holds `rates` [2] of backbone and head; `images` [3, B, H, W, 3] uint8 and `labels` [3, B]; `head/…` before
the first step, channels last; `losses` [3], each before its step; and `final/…`, every parameter after the
last, by its name in transformers. The last batch has fewer real rows: those whose label is -1 take no part.
"""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from tests.golden.cases import Case
from tests.golden.make_towers import make_model, save_checkpoint

TRAINING = Path(__file__).parent / "training"
CASE = Case(
    "training",
    "CLIPVisionModel",
    "CLIPVisionConfig",
    {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 16,
        "patch_size": 4,
        "hidden_act": "quick_gelu",
    },
    (16, 16),
)
NUM_STEPS, BATCH_SIZE, NUM_REAL = 3, 8, (8, 8, 5)
BACKBONE_RATE, HEAD_RATE = 0.1, 0.3  # high, so that three steps move every parameter by a few percent


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to train: its file is called by its name."""

    name: str
    num_classes: int
    momentum: float


WAYS = (Way("sgd", 3, 0.0), Way("momentum-binary", 2, 0.9))


def train(way: Way) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (NUM_STEPS, BATCH_SIZE, *CASE.input_size, 3), np.uint8)
    labels = rng.integers(0, way.num_classes, (NUM_STEPS, BATCH_SIZE))
    labels[np.arange(BATCH_SIZE) >= np.array(NUM_REAL)[:, None]] = -1

    model = transformers.CLIPVisionModel.from_pretrained(TRAINING).train()
    processor = transformers.CLIPImageProcessorPil.from_pretrained(TRAINING)
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    num_logits = 1 if way.num_classes == 2 else way.num_classes
    head = torch.nn.Linear(model.config.hidden_size, num_logits)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.from_numpy(0.2 * rng.standard_normal(parameter.shape)))
    start = {"kernel": head.weight.detach().T.numpy().copy(), "bias": head.bias.detach().numpy().copy()}
    groups = [
        {"params": model.parameters(), "lr": BACKBONE_RATE},
        {"params": head.parameters(), "lr": HEAD_RATE},
    ]
    optimizer = torch.optim.SGD(groups, lr=HEAD_RATE, momentum=way.momentum)
    losses = []
    for step in range(NUM_STEPS):
        real = labels[step] >= 0
        pixels = (torch.from_numpy(images[step][real]) * processor.rescale_factor - mean) / std
        logits = head(model(pixels.permute(0, 3, 1, 2)).pooler_output)
        target = torch.from_numpy(labels[step][real])
        if num_logits == 1:
            loss = binary_cross_entropy_with_logits(logits[:, 0], target.float())
        else:
            loss = cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    final = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    final |= {"head.kernel": head.weight.detach().T.numpy().copy(), "head.bias": head.bias.detach().numpy().copy()}
    return {
        "rates": np.array([BACKBONE_RATE, HEAD_RATE]),
        "images": images,
        "labels": labels,
        "losses": np.array(losses, np.float32),
        **{f"head/{name}": array for name, array in start.items()},
        **{f"final/{name}": array for name, array in final.items()},
    }


def main() -> None:
    shutil.rmtree(TRAINING, ignore_errors=True)
    save_checkpoint(make_model(CASE), CASE, TRAINING)
    for way in WAYS:
        np.savez_compressed(TRAINING / f"{way.name}.npz", **train(way))
    size = sum(path.stat().st_size for path in TRAINING.iterdir())
    print(f"{size / 1024:.0f} kB, made with torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
