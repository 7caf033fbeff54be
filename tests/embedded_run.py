"""Embeds a folder on all devices there are, for test_creation.py: python -m tests.embedded_run IMAGES BACKBONE OUT.

Prints the number of devices.
"""

import sys
from pathlib import Path

import jax

from probe.config import EmbedConfig
from probe.embed import embed

if __name__ == "__main__":
    images, backbone, out = sys.argv[1:]
    options = {"precision": "float32", "batch_size": 8, "num_workers": 1}
    embed(EmbedConfig(images=Path(images), backbone=backbone, out=Path(out), **options))
    print(len(jax.devices()))
