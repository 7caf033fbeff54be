"""The command line: thin, quick to answer, and clear about what is wrong."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import probe
from probe import errors
from probe.cli import main
from probe.storage import PARTIAL_PREFIX
from tests.conftest import write_image_folder


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def assert_refused(result: tuple[int, str, str], code: int, *words: str) -> None:
    """One clear line, the exit code of its kind, and no traceback."""
    actual_code, out, err = result
    assert actual_code == code, err
    message = err.splitlines()[-1:]
    assert message[0].startswith("probe: error: ")
    assert [line for line in err.splitlines()[:-1] if not line.startswith(("decoding", "embedding"))] == []
    assert out == ""
    for word in words:
        assert word in message[0]


def test_help_loads_no_jax_and_answers_at_once() -> None:
    check = "from probe.cli import main; main(['--help']); import sys; print({'jax', 'numpy'} & set(sys.modules))"
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.stdout.endswith("set()\n")
    assert min(seconds) < 0.5  # of a processor, which it alone keeps busy: what other work takes does not count


@pytest.mark.parametrize(
    "verb",
    [
        "embed",
        "fit-linear",
        "finetune",
        "launch",
        "zero-shot",
        "predict",
        "export",
        "serve",
        "compare",
        "report",
        "audit",
        "doctor",
        "demo",
    ],
)
def test_each_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, verb, "--help")
    assert code == 0
    assert "--json" in out
    assert "None" not in out


def test_an_option_that_may_be_left_out_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "embed", "photos", "--out", "cache", "--backbone", "b", "--limit", "None")
    assert (code, out) == (2, "")
    assert "--limit INT" in err
    assert "instantiated" not in err


@pytest.mark.parametrize(
    ("setting", "term", "colours"), [("1", "xterm", False), ("", "xterm", True), ("", "dumb", False)]
)
def test_no_color_is_heeded_on_a_terminal(setting: str, term: str, colours: bool) -> None:
    environment = {**os.environ, "TERM": term, "NO_COLOR": setting}
    terminal, its_end = os.openpty()
    command = [sys.executable, "-m", "probe.cli", "--help"]
    with subprocess.Popen(command, stdout=its_end, stderr=its_end, env=environment) as process:
        os.close(its_end)
        shown = b""
        with contextlib.suppress(OSError):  # a terminal whose other end is closed ends so
            while chunk := os.read(terminal, 65536):
                shown += chunk
        os.close(terminal)
    assert process.returncode == 0
    assert (b"\x1b[" in shown) == colours


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit-liner", "--help"], "probe has no verb 'fit-liner': did you mean `probe fit-linear`? There are embed, "),
        (["nonsense", "--help"], "probe has no verb 'nonsense': there are embed, fit-linear, "),
        (["cache", "lss", "-h"], "probe cache has no verb 'lss': did you mean `probe cache ls`? There are ls, verify"),
        (["nonsense"], "probe has no verb 'nonsense'"),
    ],
)
def test_an_unknown_verb_is_an_error_also_before_help(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"probe: error: {said}")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["probe", "fi"], {"fit-linear", "finetune"}),
        (["probe", "cache", "pr"], {"prune"}),
        (["probe", "export", "run", "--format", "o"], {"onnx"}),
        (["probe", "fit-linear", "cache", "--learning"], {"--learning-curve", "--learning-rate"}),
    ],
)
def test_bash_completes_verbs_options_and_choices(
    typed: list[str], offered: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, script, err = run(capsys, "--print-completion", "bash")
    assert code == 0, err
    (tmp_path / "completion.sh").write_text(script)
    function = next(line.split()[-2] for line in script.splitlines() if line.startswith("complete -F"))
    words = " ".join(typed)
    typing = (
        f"source completion.sh; COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; {function}; echo ${{COMPREPLY[@]}}"
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", typing], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert set(done.stdout.split()) == offered, done.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="there is no fish")
def test_fish_completes_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "probe.fish").write_text(run(capsys, "--print-completion", "fish")[1])
    typing = "source probe.fish; complete -C 'probe fi'; complete -C 'probe export run --format o'"
    done = subprocess.run(
        ["fish", "--no-config", "-c", typing], cwd=tmp_path, env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert {line.split("\t")[0] for line in done.stdout.splitlines()} == {"fit-linear", "finetune", "onnx"}, done.stderr


def test_completion_is_offered_for_known_shells_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--print-completion", "zsh")[1].startswith("#compdef probe")
    assert "complete --no-files --command 'probe'" in run(capsys, "--print-completion", "fish")[1]
    assert_refused(run(capsys, "--print-completion", "cmd.exe"), 2, "bash, zsh, fish")
    assert_refused(run(capsys, "--print-completion"), 2, "bash, zsh, fish")


def test_who_asks_for_more_is_told_options_and_where_an_error_arose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["fit-linear", tmp_path / "nowhere", "--out", tmp_path / "run", "--folds", "4"]
    code, out, err = run(capsys, *arguments, "-v")
    assert (code, out) == (3, "")
    first, *_, last = err.splitlines()
    options = json.loads(first.removeprefix("options: "))
    assert (options["folds"], options["seed"]) == (4, 0)
    assert "Traceback" in err
    assert last.startswith("probe: error: ")
    assert run(capsys, *arguments)[2] == f"{last}\n"


def test_who_asks_for_json_reads_of_errors_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "fit-linear", tmp_path / "nowhere", "--out", tmp_path / "run", "--json")
    assert code == 3
    told = json.loads(out)
    assert told["schema_version"] == 1
    assert (told["error"]["kind"], told["error"]["exit_code"]) == ("InputError", 3)
    assert err == f"probe: error: {told['error']['message']}\n"
    code, out, err = run(capsys, "fit-linear", tmp_path / "nowhere", "--json")
    assert (code, json.loads(out)["error"]["exit_code"]) == (2, 2)
    assert "--out" in err


def test_the_package_is_a_program_too() -> None:
    done = subprocess.run([sys.executable, "-m", "probe", "fit"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "probe: error: " in done.stderr


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, "probe 0.1.0\n")


def test_public_names_are_what_type_checkers_see() -> None:
    source = Path(probe.__file__).read_text()
    declared = {line.split(" as ")[1] for line in source.splitlines() if line.startswith("    from probe")}
    assert declared == set(probe._HOMES)
    for name in declared:
        assert getattr(probe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = probe.nothing


def test_every_exit_code_stands_in_the_table() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ProbeError)]
    for kind in kinds:
        assert f"| {kind.exit_code} |" in errors.__doc__ or f"| {kind.exit_code}, " in errors.__doc__
    codes = [kind.exit_code for kind in kinds]
    assert len(codes) == len(set(codes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """A folder with images/, cache/ and run/, made by the command line."""
    root = tmp_path_factory.mktemp("trained")
    write_image_folder(root / "images", {"train": 12, "test": 4})
    assert main(["embed", f"{root}/images", "--backbone", str(tiny_clip), "--out", f"{root}/cache"]) == 0
    assert main(["fit-linear", f"{root}/cache", "--out", f"{root}/run"]) == 0
    return root


def test_json_goes_to_stdout_and_is_what_metrics_json_holds(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "fit-linear", trained / "cache", "--out", tmp_path / "run", "--json")
    assert code == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert json.loads(out) == {"schema_version": 1, **metrics}


def test_a_list_option_does_not_swallow_the_images(
    tiny_clip: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--backbone", tiny_clip, "--out", tmp_path / "run", "--epochs", 1]
    assert run(capsys, "finetune", *options, "--freeze", "backbone", image_folder)[0] == 0


def test_hidden_takes_widths_and_leaves_the_cache_alone(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(
        capsys,
        "fit-linear",
        "--head",
        "mlp",
        "--out",
        tmp_path / "run",
        "--epochs",
        1,
        "--hidden",
        8,
        4,
        trained / "cache",
    )
    assert result[0] == 0, result[2]


def test_usage_errors_exit_with_2(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(
        run(capsys, "fit-linear", trained / "cache", "--out", tmp_path / "run", "--head", "mlp", "--hidden", 0),
        2,
        "--hidden",
        "0",
    )
    assert run(capsys, "fit-linear", trained / "cache")[0] == 2  # --out is missing
    assert run(capsys, "fit-linear", trained / "cache", "--out", tmp_path / "run", "--bundle-backbone", "False")[0] == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_quiet_verbs_leave_stderr_to_errors(
    quiet: list[str], tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_image_folder(tmp_path / "images", {"train": 6, "test": 2})
    backbone = ["--backbone", str(tiny_clip)]
    for command in (
        ["embed", images, *backbone, "--out", tmp_path / "cache"],
        ["fit-linear", tmp_path / "cache", "--out", tmp_path / "run", "--no-report"],
        ["finetune", images, *backbone, "--out", tmp_path / "tuned", "--epochs", "1", "--no-report"],
        ["predict", tmp_path / "run", images],
    ):
        code, out, err = run(capsys, *command, *quiet)
        assert code == 0, err
        assert out != ""
        if quiet:
            assert err == ""
        elif command[0] == "finetune":
            assert "epoch 1: loss" in err
    (images / "broken.jpg").write_bytes(b"no picture")
    assert "broken.jpg: not classified" in run(capsys, "predict", tmp_path / "run", images, *quiet)[2]


class TestBadInput:
    """Each gives one line (what, where, what to do), its exit code, no traceback, and nothing half-written."""

    @pytest.fixture(autouse=True)
    def nothing_half_written(self, tmp_path: Path):
        yield
        assert not list(tmp_path.rglob(f"{PARTIAL_PREFIX}*"))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("verb", ["embed", "finetune"])
    def test_empty_folder(self, verb: str, tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "empty").mkdir()
        result = run(capsys, verb, tmp_path / "empty", "--backbone", tiny_clip, "--out", tmp_path / "out")
        assert_refused(result, 3, "empty", "root/class/*")

    @pytest.mark.parametrize("verb", ["embed", "finetune"])
    def test_missing_folder_and_a_file_in_place_of_one(
        self, verb: str, tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "notes.txt").write_text("not images")
        for name in ("nowhere", "notes.txt"):
            result = run(capsys, verb, tmp_path / name, "--backbone", tiny_clip, "--out", tmp_path / "out")
            assert_refused(result, 3, name)

    def test_one_class_only(self, tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        images = write_image_folder(tmp_path / "images", {"": 3}, classes=("red",))
        result = run(capsys, "finetune", images, "--backbone", tiny_clip, "--out", tmp_path / "out")
        assert_refused(result, 3, "red", "class")

    def test_a_test_class_that_train_lacks(
        self, tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images = write_image_folder(tmp_path / "images", {"train": 6}, classes=("red", "green"))
        write_image_folder(images, {"test": 2}, classes=("blue", "red"))
        result = run(capsys, "finetune", images, "--backbone", tiny_clip, "--out", tmp_path / "out")
        assert_refused(result, 3, "blue", "train")

    def test_a_cache_made_with_another_backbone(
        self, trained: Path, tiny_resnet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        result = run(capsys, "embed", trained / "images", "--backbone", tiny_resnet, "--out", trained / "cache")
        assert_refused(result, 5, "backbone", "cache")

    def test_a_truncated_shard(self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        cache = copy_folder(trained / "cache", tmp_path / "cache")
        shard = next(cache.rglob("shards/**/*.h5"))
        shard.write_bytes(shard.read_bytes()[:-100])
        assert_refused(run(capsys, "fit-linear", cache, "--out", tmp_path / "out"), 6, shard.name)

    def test_a_run_folder_with_a_missing_or_damaged_file(
        self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in ("head.safetensors", "classifier.json", "metrics.json", "manifest.json"):
            damaged = copy_folder(trained / "run", tmp_path / f"run-without-{name}")
            (damaged / name).unlink()
            result = run(capsys, "predict", damaged, trained / "images", "--out", tmp_path / "out")
            assert_refused(result, 3 if name == "manifest.json" else 6, name)
        damaged = copy_folder(trained / "run", tmp_path / "run-flipped")
        head = bytearray((damaged / "head.safetensors").read_bytes())
        head[-1] ^= 1
        (damaged / "head.safetensors").write_bytes(head)
        assert_refused(
            run(capsys, "predict", damaged, trained / "images", "--out", tmp_path / "out"),
            6,
            "head.safetensors is damaged",
        )

    def test_out_that_exists_is_kept(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = (trained / "run" / "manifest.json").read_bytes()
        assert_refused(run(capsys, "fit-linear", trained / "cache", "--out", trained / "run"), 3, "--overwrite")
        assert (trained / "run" / "manifest.json").read_bytes() == before


def copy_folder(source: Path, target: Path) -> Path:
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return target


def test_what_a_start_was_fitted_or_chosen_on_is_not_judged(
    trained: Path, tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The head of a fit-linear run has seen every training row, and with them what finetune would hold out."""
    options = ["--backbone", tiny_clip, "--init", trained / "run", "--epochs", 1, "--out", tmp_path / "tuned"]
    code, out, err = run(capsys, "finetune", trained / "images", *options)
    assert code == 0, err
    val = json.loads((tmp_path / "tuned" / "metrics.json").read_text())["splits"]["val"]
    assert val["accuracy"] is None
    assert "was fitted or chosen on some of these rows" in val["why"]
    assert "no figure for its" in out
    seen_by_start = probe.load_run(trained / "run").seen
    assert len(seen_by_start) == 36
    assert probe.load_run(tmp_path / "tuned").seen >= seen_by_start  # what a start has seen, its successor has


def test_test_images_that_are_also_trained_on_are_told(
    tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_image_folder(tmp_path / "images", {"train": 8})
    copy_folder(images / "train" / "red", images / "test" / "red")
    assert run(capsys, "embed", images, "--backbone", tiny_clip, "--out", tmp_path / "cache")[0] == 0
    _, out, _ = run(capsys, "fit-linear", tmp_path / "cache", "--out", tmp_path / "run")
    assert "8 of the 8 test images are also among those trained or chosen on" in out


def test_a_finished_run_survives_a_terminal_without_greek(trained: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "probe.cli", "fit-linear", str(trained / "cache"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0, done.stderr
    assert rb"\u03bb" in done.stdout


def test_a_failed_image_whose_name_is_no_text(
    tiny_clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_image_folder(tmp_path / "images", {"train": 6})
    Path(os.fsdecode(os.fsencode(images / "train" / "red") + b"/\xff.png")).write_bytes(b"not an image")
    options = ["--backbone", tiny_clip, "--epochs", 1, "--out", tmp_path / "run", "--json"]
    code, out, err = run(capsys, "finetune", images, *options)
    assert code == 0, err
    assert [failure["path"] for failure in json.loads(out)["failures"]] == ["train/red/\udcff.png"]
