"""`probe doctor`: figures that can be true, and a word for everything that is slow."""

import json
import math
from pathlib import Path

import pytest

from probe import doctor as doctor_module
from probe.cli import main
from probe.config import DoctorConfig
from probe.doctor import describe, doctor
from probe.errors import InputError


@pytest.fixture(scope="module")
def result(tiny_clip: Path) -> dict:
    return doctor(DoctorConfig(backbone=str(tiny_clip)))


def test_figures_hang_together(result: dict) -> None:
    assert result["devices"][0]["platform"] == "cpu"
    assert set(result["operations_per_second"]) == {"float32", "bfloat16", "int8"}
    bounds = result["backbone"]["images_per_second"]
    for precision, rate in result["operations_per_second"].items():
        assert math.isclose(bounds[precision] * result["backbone"]["flops_per_image"], rate)
    decoding = result["decoding"]
    # two workers cannot decode more than two images in the time of one
    assert decoding["images_per_second"] < 2 * decoding["num_workers"] * 1e3 / decoding["decode_ms"]
    assert json.loads(json.dumps(result)) == result


def test_precisions_are_compared_with_float32(result: dict, tiny_resnet: Path) -> None:
    differences = result["backbone"]["differences"]
    assert set(differences) == {"bfloat16", "int8"}
    for difference in differences.values():
        assert 0.99 < difference["cosine"] < 1  # rounded, and close
        assert difference["max_abs"] > 0
    assert "int8 beside float32 on 2 images: cosine 0.99" in describe(result)
    resnet = doctor(DoctorConfig(backbone=str(tiny_resnet)))["backbone"]
    assert set(resnet["differences"]) == {"bfloat16"}
    assert set(resnet["images_per_second"]) == {"float32", "bfloat16"}  # it has no int8 that could be as fast as that


def test_the_text_names_versions_devices_rates_and_bounds(result: dict) -> None:
    text = describe(result)
    for words in ("python 3.", "jaxlib", "libjpeg", "device: cpu", "matrix products, int8:", "decoding:", "at most"):
        assert words in text
    # the tower is tiny, so that decoding is what would bound it
    assert "warning: decoding reaches" in text


def test_images_of_ones_own(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--images", str(image_folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["decoding"]["what"] == f"48 images of {image_folder}"
    assert "backbone" not in result
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the sample images can be decoded: not a JPEG"):
        doctor(DoctorConfig(images=tmp_path / "bad"))


@pytest.fixture
def figures(result: dict) -> dict:
    """A machine without faults: each test adds one."""
    rates = {"float32": 1e11, "bfloat16": 2e11, "int8": 4e11}
    decoding = dict.fromkeys(("read_ms", "decode_ms"), 0.5) | {"num_workers": 2, "images_per_second": 1e9, "what": ""}
    return {
        **result,
        "operations_per_second": rates,
        "decoding": decoding,
        "usable_cores": 2,
        "num_cores": 2,
        "backbone": {**result["backbone"], "images_per_second": {"float32": 10.0}},
    }


def warnings_of(figures: dict) -> list[str]:
    return doctor_module._warnings(figures, doctor_module._Decoding(**figures["decoding"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"operations_per_second": {"float32": 1e11, "bfloat16": 1e11, "int8": 4e11}}, "bfloat16 is no faster"),
        ({"usable_cores": 1}, "only 1 of 2 cores may be used"),
        ({"decoding": {"read_ms": 9.0}}, "reading an image takes 9.0 ms, longer than decoding"),
        ({"decoding": {"images_per_second": 5.0}}, "--decode fast"),
    ],
)
def test_what_will_be_slow_is_told(change: dict, words: str, figures: dict) -> None:
    assert warnings_of(figures) == []
    for field, value in change.items():
        figures[field] = figures[field] | value if isinstance(value, dict) else value
    (warning,) = warnings_of(figures)
    assert words in warning


def test_surroundings_that_slow_jax_down(figures: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(doctor_module, "_ACCELERATORS", {str(tmp_path / "nvidia0"): "pip install -U 'jax[cuda13]'"})
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert "there is an accelerator, but jax does not use it; install" in warnings_of(figures)[0]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "JAX_PLATFORMS is 'cpu': unset it" in warnings_of(figures)[0]
    monkeypatch.setattr(doctor_module, "_ACCELERATORS", {})
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
    assert "XLA_FLAGS keeps jax to one thread" in warnings_of(figures)[0]


def test_programs_that_cannot_be_kept_are_told(figures: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (warning,) = warnings_of(figures)
    assert f"every run compiles anew: {tmp_path / 'file' / 'probe' / 'compiled'}" in warning
    assert "cannot be written to (Not a directory)" in warning
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "kept"))
    assert warnings_of(figures) == []
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file"))
    assert f"{tmp_path / 'file'} cannot be written to" in warnings_of(figures)[0]
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert "JAX_COMPILATION_CACHE_DIR is empty: unset it" in warnings_of(figures)[0]
