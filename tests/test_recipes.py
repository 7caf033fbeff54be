"""The README's recipes for other schedulers run as printed. pytest -m cluster tests/test_recipes.py"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from probe.cache import Cache, load_manifest
from tests.loopback import alone
from tests.test_readme import block_under

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def embed_here(images: Path, backbone: Path, cache: Path, *, like: Path) -> None:
    """Embeds in one process, as the other cache was made: left to itself, it would measure what is fastest here."""
    identity = load_manifest(like).identity
    options = ["--precision", identity["precision"]["name"], "--batch-size", str(identity["batch_size"])]
    command = [BIN / "probe", "embed", images, "--backbone", backbone, "--out", cache, *options]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def assert_same(ours: Path, theirs: Path) -> None:
    a, b = Cache.open(ours), Cache.open(theirs)
    assert list(a.table.names) == list(b.table.names)
    assert (a.embeddings() == b.embeddings()).all()


def test_the_slurm_array_makes_one_cache(image_folder: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """Slurm cannot be installed here; a shell and its two variables stand for it."""
    script = block_under("Other schedulers", "bash")
    assert script.startswith("#!/bin/bash\n#SBATCH --array=0-15\n")
    (tmp_path / "photos").symlink_to(image_folder)
    tasks = [
        subprocess.Popen(
            ["bash", "-ec", script.replace("--backbone B", f"--backbone {tiny_clip}")],
            cwd=tmp_path,
            env=os.environ
            | {
                "PATH": f"{BIN}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
                "SLURM_ARRAY_TASK_ID": str(index),
                "SLURM_ARRAY_TASK_COUNT": "2",
            },
        )
        for index in range(2)
    ]
    assert [task.wait() for task in tasks] == [0, 0]
    embed_here(image_folder, tiny_clip, tmp_path / "local", like=tmp_path / "cache")
    assert_same(tmp_path / "cache", tmp_path / "local")


SRUN = """#!/bin/bash
# Stands for Slurm's srun: two tasks on this machine, and of Slurm's variables those that jax reads.
[ "$1" = --kill-on-bad-exit ] && shift
export SLURM_JOB_ID=$$ SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || exit; done
"""


def test_the_slurm_job_trains_on_all_its_tasks(image_folder: Path, tiny_clip: Path, tmp_path: Path) -> None:
    script = block_under("Training on several machines", "bash")
    assert script.startswith("#!/bin/bash\n#SBATCH --nodes=4")
    (tmp_path / "photos").symlink_to(image_folder)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN)
    (tmp_path / "bin" / "srun").chmod(0o755)
    done = subprocess.run(
        ["bash", "-ec", script.replace("--backbone B", f"--backbone {tiny_clip} --epochs 1 --batch-size 8")],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path}/bin:{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "tuned" / "made.json").read_text())
    assert made["hardware"]["num_devices"] == 2
    assert done.stdout.count("saved in tuned") == 1


def test_the_spark_job_makes_one_cache(image_folder: Path, tiny_clip: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyspark", reason="Spark is not installed: pip install pyspark, and a Java")
    assert block_under("Other schedulers", "python") == (ROOT / "tests" / "spark_recipe.py").read_text()
    arguments = [str(image_folder), str(tiny_clip), str(tmp_path / "cache")]
    done = subprocess.run(
        alone(sys.executable, str(ROOT / "tests" / "spark_recipe.py"), *arguments),
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "PYSPARK_PYTHON": sys.executable,
            "PYSPARK_SUBMIT_ARGS": "--master local[2] --conf spark.ui.enabled=false pyspark-shell",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "48 images were computed" in done.stdout
    embed_here(image_folder, tiny_clip, tmp_path / "local", like=tmp_path / "cache")
    assert_same(tmp_path / "cache", tmp_path / "local")
