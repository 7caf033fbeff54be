"""The map of design: imports point from verbs to nouns and never back, and only named modules touch what is theirs."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "probe"
VERBS = {
    f"probe.{verb}"
    for verb in (
        "audit", "cache_tools", "cli", "compare", "demo", "doctor", "embed", "exchange", "export", "finetune", "launch",
        "linear", "predict", "report", "serve", "zero_shot",
    )
}  # fmt: skip
ONLY_IMPORTERS = {
    "h5py": "probe.cache",
    "tyro": "probe.cli probe.config",
    "IPython": "probe.notebook",
    "onnx": "probe.exporting.onnx_file",
    "orbax": "probe.training.checkpoints",
    "tensorboardX": "probe.training.events",
    "mlflow": "probe.training.mlflow_store",
    "wandb": "probe.training.wandb_run",
    "ray": "probe.engines.ray",
    "upath": "probe.storage",
    "starlette": "probe.serving",
    "uvicorn": "probe.serving.server",
}


def module_name(path: Path) -> str:
    parts = ("probe", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imported(tree: ast.AST) -> set[str]:
    """Every module that `tree` imports anywhere, `from probe import x` counted as probe.x."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_from_verbs_to_nouns(name: str) -> None:
    allowed = VERBS if name in ("probe", "probe.cli", "probe.__main__") else set()
    assert not (imported(MODULES[name]) & VERBS) - allowed


@pytest.mark.parametrize("library", ONLY_IMPORTERS)
def test_one_module_owns_a_library(library: str) -> None:
    owners = ONLY_IMPORTERS[library].split()
    users = {name for name, tree in MODULES.items() if any(i.split(".")[0] == library for i in imported(tree))}
    assert {user for user in users if not any(user == o or user.startswith(f"{o}.") for o in owners)} == set()


def test_imports_have_no_cycles() -> None:
    graph = {name: {i for i in imported(tree) if i in MODULES and i != name} for name, tree in MODULES.items()}
    done: set[str] = set()
    while len(done) < len(graph):
        free = {name for name, needs in graph.items() if name not in done and needs <= done | {"probe"}}
        assert free, f"a cycle among {sorted(set(graph) - done)}"
        done |= free


def test_there_is_no_utils_module() -> None:
    assert not [name for name in MODULES if "util" in name or "helper" in name or "common" in name]
