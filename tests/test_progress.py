"""Progress where stderr is a pipe: a line now and then, and a last one."""

import re
import types
from pathlib import Path

import numpy as np
import pytest

from probe import progress
from probe.cache import write_cache
from probe.cli import main
from probe.progress import Progress, Stages, heeds_quiet, say


def test_who_has_seen_a_line_sees_the_last_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0)
    with Progress("embedding", total=4, unit="images") as bar:
        for _ in range(4):
            bar.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("embedding: 1 of 4 images, ")
    assert re.fullmatch(r"embedding: 4 of 4 images, [\d.]+ images/s, done in 0 s", lines[-1])


def test_what_else_there_is_to_know_stands_beside_the_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0)
    with Progress("embedding", total=4, unit="images") as bar:
        bar.advance(1)
        bar.note("2 workers, 1 failed")
        bar.advance(1)
    first, second, _ = capsys.readouterr().err.splitlines()
    assert ";" not in first
    assert re.fullmatch(r"embedding: 2 of 4 images, [\d.]+ images/s, \d+ s left; 2 workers, 1 failed", second)


def test_several_processes_on_one_cache_tell_of_all_shards_and_of_failures(
    image_folder: Path,
    tiny_clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0)
    sorted(image_folder.rglob("*.png"))[0].write_bytes(b"no picture")
    options = ["--batch-size", "8", "--precision", "float32", "--shard-rows", "8", "--num-workers", "1"]
    command = ["embed", str(image_folder), "--backbone", str(tiny_clip), "--out", str(tmp_path / "cache"), *options]
    for index in range(2):
        assert main([*command, "--num-shards", "2", "--shard-index", str(index)]) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("embedding: 24 of 24")]
        assert f"{3 + 3 * index} of 6 shards of all processes are sealed" in lines[-1]
        assert ("1 failed" in lines[-1]) == (index == 0)


def test_a_short_run_and_one_that_failed_say_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("embedding", total=4, unit="images") as bar:
        bar.advance(4)
    with pytest.raises(ZeroDivisionError), Progress("embedding", total=4, unit="images") as bar:
        bar.advance(1 // 0)
    assert capsys.readouterr().err == ""


def test_stages_have_a_heading_each(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0)
    with Stages() as report:
        report("choosing λ", 3, 10, "fits")
        report("choosing λ", 7, 10, "fits")
        report("final fit", 20, None, "passes")
    err = capsys.readouterr().err
    assert "choosing λ: 3 of 10 fits" in err
    assert "choosing λ: 7 of 10 fits" in err
    assert "final fit: 20 passes" in err


def test_a_quiet_verb_says_nothing_on_its_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0)

    @heeds_quiet
    def verb(config: types.SimpleNamespace) -> int:
        with Stages() as report:
            report("choosing λ", 3, 10, "fits")
        say("on the way")
        return config.result

    assert verb(types.SimpleNamespace(quiet=True, result=1)) == 1
    assert capsys.readouterr() == ("", "")
    assert verb(types.SimpleNamespace(quiet=False, result=2)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "choosing λ: 3 of 10 fits" in err
    assert "on the way" in err


@pytest.mark.parametrize("quiet", [False, True])
def test_fit_linear_tells_how_far_it_is(
    quiet: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", 0)
    rng = np.random.default_rng(0)
    write_cache(
        tmp_path / "cache",
        rng.normal(size=(60, 4)).astype(np.float32),
        labels=np.arange(60) % 2,
        class_names=("cat", "dog"),
        splits=["test" if row < 20 else "train" for row in range(60)],
    )
    options = ["--shots", "1", "2", "--seeds", "2", "--penalties", "1", "0.1", *(["--quiet"] if quiet else [])]
    assert main(["fit-linear", str(tmp_path / "cache"), "--out", str(tmp_path / "run"), "--no-report", *options]) == 0
    err = capsys.readouterr().err
    if quiet:
        assert err == ""
    else:
        assert re.search(r"choosing λ: \d+ of 10 fits", err)
        assert re.search(r"final fit: \d+ passes", err)
        assert re.search(r"few shots: 3 of 4 heads", err)
