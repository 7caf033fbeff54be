"""`probe demo` refuses what it would overwrite, and ends where a step fails. That it works, test_readme.py shows."""

import re
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from probe import demo
from probe.cli import main
from probe.errors import CorruptError
from tests.test_cli import assert_refused, run


def test_a_folder_that_exists_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "note.txt").write_text("mine")
    assert_refused(run(capsys, "demo", "--out", tmp_path), 3, "exists: give another --out")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_step_that_fails_ends_the_demo_with_its_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "samples" / "emoji.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("train/cat/0.png", b"no picture")
    monkeypatch.setattr(demo, "_PLACES", (archive.parent,))
    assert main(["demo", "--out", str(tmp_path / "out")]) == 3
    out, err = capfd.readouterr()
    assert out.startswith("\n$ probe embed ")
    assert err.splitlines()[-1].startswith("probe: error: the demo ends here, since this failed: probe embed ")


def test_samples_that_are_missing_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_PLACES", (tmp_path,))
    with pytest.raises(CorruptError, match=r"emoji\.zip is missing"):
        demo.samples()


def test_the_samples_test_names_that_train_lacks() -> None:
    with zipfile.ZipFile(demo.samples()) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    parts = np.array([name.split("/") for name in files])
    splits, classes, names = parts.T
    assert set(splits) == {"train", "val", "test"}
    assert len(set(classes)) == 9
    for split in ("train", "val", "test"):
        assert set(classes[splits == split]) == set(classes)
    assert not set(names[splits == "test"]) & set(names[splits != "test"])
    assert len(set(files.values())) == len(files)  # no picture twice: a test image is never also trained on
    assert not [name for name in names if name.endswith("-facing-right.png")]  # nor its mirror image
    of_stem = defaultdict(set)
    for split, name in zip(splits, names, strict=True):
        of_stem[re.sub(r"\b(man|woman|person|men|women|people)\b-?", "", name)].add(split)
    alone = {"", ".png"}  # a man, a woman and a person of whom nothing else is said are names of their own
    assert not [stem for stem, found in of_stem.items() if len(found) > 1 and stem not in alone]
    assert demo.samples().stat().st_size < 5_000_000
