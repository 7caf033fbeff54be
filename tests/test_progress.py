"""Progress where stderr is a pipe: a line now and then, and a last one."""

import re

import pytest

from probe import progress
from probe.progress import Progress


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


def test_a_short_run_and_one_that_failed_say_nothing_more(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("embedding", total=4, unit="images") as bar:
        bar.advance(4)
    with pytest.raises(ZeroDivisionError), Progress("embedding", total=4, unit="images") as bar:
        bar.advance(1 // 0)
    assert capsys.readouterr().err == ""
