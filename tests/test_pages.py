"""Huge pages: asked for by a restart that changes nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from probe.pages import huge_page_environment

SCRIPT = """
import os, sys
print(os.getpid(), flush=True)
from probe.pages import restart_with_huge_pages
restart_with_huge_pages()
print(os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:])
"""
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ON_REQUEST = SWITCH.exists() and "[madvise]" in SWITCH.read_text()


def run(**environment: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", SCRIPT, "a b", "--json"]
    child = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True)
    assert not child.stderr
    return child.stdout.splitlines()


@pytest.mark.skipif(not ON_REQUEST, reason="this kernel gives huge pages to all, or to none")
def test_a_process_starts_anew_once_under_its_id_and_arguments():
    *ids, last = run(GLIBC_TUNABLES="glibc.malloc.check=0")
    assert ids == [ids[0]] * 2
    assert last == "glibc.malloc.check=0:glibc.malloc.hugetlb=1 a b --json"


def test_what_the_user_has_set_wins():
    _, last = run(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert last == "glibc.malloc.hugetlb=0 a b --json"


def test_nothing_is_lacking_where_they_are_asked_for(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    assert huge_page_environment() == {}
