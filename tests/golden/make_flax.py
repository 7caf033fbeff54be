"""Makes tests/golden/flax/: checkpoints as transformers' former Flax classes save them, and what they compute.

Run after make_towers.py, from the root of the repository, in an environment of its own with the last release
that has these classes (4.57.6; it is not maintained, so it is no dependency of anything here):

    pip install "transformers==4.57.6" jax flax safetensors
    python -m tests.golden.make_flax

Weights come from the PyTorch checkpoints of make_towers.py through transformers' own conversion. For basic ResNet
layers that conversion matches no name and leaves the weights at their random start, which serves as well: the
golden outputs are those of the Flax model itself.
"""

import shutil

import numpy as np
import transformers

from tests.golden.cases import FLAX, TOWERS

MODELS = {
    "clip": transformers.FlaxCLIPModel,  # what openai/clip-vit-base-patch32 has on its main branch
    "resnet-bottleneck": transformers.FlaxResNetForImageClassification,
    "resnet-basic": transformers.FlaxResNetModel,
}


def main() -> None:
    for name, model_class in MODELS.items():
        source, folder = TOWERS / name, FLAX / name
        shutil.rmtree(folder, ignore_errors=True)
        model = model_class.from_pretrained(source)
        model.save_pretrained(folder)
        shutil.copy(source / "preprocessor_config.json", folder)
        pixels = np.load(source / "golden.npz")["pixels"]
        channels_first = pixels.transpose(0, 3, 1, 2)
        outputs = {}
        if name == "clip":
            outputs["projected"] = np.asarray(model.get_image_features(channels_first))
        elif name == "resnet-bottleneck":
            logits = model(channels_first).logits
            outputs["logits"] = np.asarray(logits)
            classifier = model.params["params"]["classifier"]["1"]
            outputs |= {f"classifier/{leaf}": np.asarray(array) for leaf, array in classifier.items()}
        else:
            outputs["pooler_output"] = np.asarray(model(channels_first).pooler_output)[:, :, 0, 0]
        np.savez_compressed(folder / "golden.npz", pixels=pixels, **outputs)
    print(f"made with transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
