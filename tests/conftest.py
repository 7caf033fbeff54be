"""What every test may ask for: tiny real checkpoints, and a folder of pictures whose classes can be told apart."""

import os
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.checkpoints import write_tiny_clip, write_tiny_resnet

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Many tests compile the same tiny programs, here and in the processes that they start: the programs are kept until the
# tests end, for each process of pytest apart, since jax may read what another has half written.
_COMPILED = tempfile.TemporaryDirectory(prefix="probe-tests-", ignore_cleanup_errors=True)
os.environ |= {"JAX_COMPILATION_CACHE_DIR": _COMPILED.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05"}
jax.config.update("jax_compilation_cache_dir", _COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)

SHARED = Path(__file__).resolve().parents[2] / "shared"  # development photos and weights, not part of the product


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a CLIP vision tower: width 16, projection 8, images of 16 × 16."""
    return write_tiny_clip(tmp_path_factory.mktemp("checkpoints") / "tiny-clip")


@pytest.fixture(scope="session")
def tiny_resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a ResNet: width 16, images of 32 × 32."""
    return write_tiny_resnet(tmp_path_factory.mktemp("checkpoints") / "tiny-resnet")


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """root/{train,test}/{blue,green,red}/*.png: 12 and 4 noisy pictures a class, of 20 × 24 pixels."""
    return write_image_folder(tmp_path / "images", {"train": 12, "test": 4})


def write_image_folder(
    root: Path,
    num_per_class: dict[str, int],
    classes: tuple[str, ...] = ("blue", "green", "red"),
    seed: int = 0,
) -> Path:
    """Writes root/split/class/*.png; the class is the brightest colour. An empty split name means root/class/*."""
    rng = np.random.default_rng(seed)
    channels = {"red": 0, "green": 1, "blue": 2}
    for split, num in num_per_class.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(num):
                pixels = rng.integers(0, 120, (20, 24, 3), np.uint8)
                pixels[..., channels[name]] += 100
                Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return root


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, of the system."""
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'probe-jax[browser]'")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def axe():
    """Accessibility, checked by axe-core."""
    module = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install 'probe-jax[browser]'")
    return module.Axe()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos and weights beside the checkout; skips the test where it is absent."""
    if not (SHARED / "data" / "dogs_cats").is_dir():
        pytest.skip(f"real photos and weights are not here: {SHARED} is absent")
    return SHARED
