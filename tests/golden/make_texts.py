"""Makes tests/golden/texts/: tiny random text towers as transformers saves them, and what PyTorch makes of them.

Run where PyTorch and transformers 5 are installed, from the root of the repository:

    python -m tests.golden.make_texts

Each case is a folder: the checkpoint (config.json, model.safetensors, preprocessor_config.json) and golden.npz with
`tokens` [B, T], each layer's output by its name in transformers, the outputs of the whole, and, where the model has
both towers, `pixels` and `logits_per_image`.
"""

import shutil

import numpy as np
import torch
import transformers

from tests.golden.cases import TEXT_CASES, TEXTS, Case
from tests.golden.make_towers import make_model, make_pixels, save_checkpoint


def make_tokens(case: Case, seed: int = 1) -> np.ndarray:
    """[5, T]: random texts, of which one ends at its first token and one twice (the first end counts)."""
    config = case.config.get("text_config", case.config)
    length, vocabulary = config["max_position_embeddings"], config["vocab_size"]
    end = vocabulary - 1 if config["eos_token_id"] == 2 else config["eos_token_id"]
    others = [token for token in range(vocabulary - 1) if token != end]
    tokens = np.random.default_rng(seed).choice(others, (5, length))
    for row, position in enumerate((length - 1, 2, 0, 3, 1)):
        tokens[row, position] = end
    tokens[3, -1] = end
    return tokens.astype(np.int64)


def run_texts(model: torch.nn.Module, tokens: np.ndarray, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Each layer's output by its name within the text tower, and the outputs of the whole."""
    outputs: dict[str, np.ndarray] = {"tokens": tokens}

    def record(name: str):
        def hook(module, inputs, output):
            tensor = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
            outputs[f"module/{name}"] = tensor.numpy().copy()

        return hook

    tower = model.text_model
    for name, module in tower.named_modules():
        if name and type(module).__name__.startswith(("CLIP", "LayerNorm")):
            module.register_forward_hook(record(name))
    ids = torch.from_numpy(tokens)
    with torch.no_grad():
        result = tower(input_ids=ids)
        outputs["last_hidden_state"] = result.last_hidden_state.numpy().copy()
        outputs["pooler_output"] = result.pooler_output.numpy().copy()
        outputs["projected"] = model.text_projection(result.pooler_output).numpy().copy()
        if isinstance(model, transformers.CLIPModel):
            channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2)
            outputs["pixels"] = pixels
            outputs["logits_per_image"] = model(input_ids=ids, pixel_values=channels_first).logits_per_image.numpy()
    return outputs


def main() -> None:
    for case in TEXT_CASES:
        folder = TEXTS / case.name
        shutil.rmtree(folder, ignore_errors=True)
        model = make_model(case)
        save_checkpoint(model, case, folder)
        np.savez_compressed(folder / "golden.npz", **run_texts(model, make_tokens(case), make_pixels(case)))
        print(f"{case.name}: {sum(path.stat().st_size for path in folder.iterdir()) / 1024:.0f} kB")
    print(f"made with torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
