"""Makes tests/golden/towers/: tiny random checkpoints as transformers saves them, and what PyTorch makes of them.

Run where PyTorch and transformers 5 are installed, from the root of the repository:

    python -m tests.golden.make_towers

Each case is a folder: the checkpoint (config.json, model.safetensors, preprocessor_config.json) and golden.npz
with `pixels` [B, H, W, 3], each layer's output by its name in transformers, and the outputs of the whole, channels
last. All parameters are random, those that transformers starts at 0 or 1 too, so that a swapped or forgotten
array shows. make_flax.py puts Flax checkpoints of the same weights beside them.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.checkpoints import CLIP_PREPROCESSOR
from tests.golden.cases import CASES, SHARED_GOLDEN, TOWERS, Case, synthetic_images


def make_model(case: Case, seed: int = 0) -> torch.nn.Module:
    """The transformers model of a case, in evaluation mode, every parameter and statistic random."""
    config_class = getattr(transformers, case.config_class)
    model = getattr(transformers, case.architecture)(config_class(**case.config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.ndim > 1:  # keeps the scale of what flows through
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
            else:
                is_scale = "norm" in name and name.endswith(".weight")
                tensor.copy_(0.3 * noise + (1.0 if is_scale else 0.0))
    return model


def tower_of(model: torch.nn.Module) -> torch.nn.Module:
    """The vision tower within a model with more parts."""
    return getattr(model, "vision_model", getattr(model, "resnet", model))


def run(model: torch.nn.Module, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Each layer's output by its name within the tower, and the outputs of the whole, channels last."""
    tower = tower_of(model)
    outputs: dict[str, np.ndarray] = {}

    def record(name: str):
        def hook(module, inputs, output):
            tensor = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
            outputs[f"module/{name}"] = channels_last(tensor)

        return hook

    handles = [
        module.register_forward_hook(record(name))
        for name, module in tower.named_modules()
        if name and type(module).__name__.startswith(("CLIP", "ResNetConv", "ResNetShort", "ResNetB", "LayerNorm"))
    ]
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        result = tower(channels_first)
        outputs["last_hidden_state"] = channels_last(result.last_hidden_state)
        outputs["pooler_output"] = result.pooler_output.flatten(1).numpy()
        if hasattr(model, "visual_projection"):
            outputs["projected"] = model.visual_projection(result.pooler_output).numpy()
        for handle in handles:
            handle.remove()
        if hasattr(tower, "embedder"):  # a ResNet normalises by its batch in training
            tower.train()
            outputs["train/pooler_output"] = tower(channels_first).pooler_output.flatten(1).numpy()
            outputs["train/running_mean"] = tower.embedder.embedder.normalization.running_mean.numpy().copy()
            tower.eval()
    return outputs


def channels_last(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).contiguous().numpy().copy()


def make_pixels(case: Case, seed: int = 1) -> np.ndarray:
    height, width = case.input_size
    return np.random.default_rng(seed).standard_normal((2, height, width, 3)).astype(np.float32)


def save_checkpoint(model: torch.nn.Module, case: Case, folder: Path) -> None:
    """The model's own save_pretrained, and a preprocessor_config.json for the case's size."""
    model.save_pretrained(folder)
    height, width = case.input_size
    size = {"size": {"shortest_edge": min(height, width)}, "crop_size": {"height": height, "width": width}}
    (folder / "preprocessor_config.json").write_text(json.dumps(CLIP_PREPROCESSOR | size, indent=2) + "\n")


def make_shared(checkpoint: Path) -> None:
    """Golden features of the real ResNet beside the checkout, which only development has."""
    preprocessor = json.loads((checkpoint / "preprocessor_config.json").read_text())
    pixels = synthetic_images() * preprocessor["rescale_factor"]
    pixels = ((pixels - preprocessor["image_mean"]) / preprocessor["image_std"]).astype(np.float32)
    outputs = run(transformers.ResNetModel.from_pretrained(checkpoint).eval(), pixels)
    np.savez_compressed(SHARED_GOLDEN, pooler_output=outputs["pooler_output"])


def main() -> None:
    for case in CASES:
        folder = TOWERS / case.name
        shutil.rmtree(folder, ignore_errors=True)
        model, pixels = make_model(case), make_pixels(case)
        save_checkpoint(model, case, folder)
        np.savez_compressed(folder / "golden.npz", pixels=pixels, **run(model, pixels))
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{case.name}: {size / 1024:.0f} kB")
    shared = Path(__file__).parents[3] / "shared" / "models" / "resnet50-thin"
    if shared.is_dir():
        make_shared(shared)
    print(f"made with torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
