"""The command line: argv to config, config to one call, its result to stdout, an error to an exit code.

jax is imported inside the verb, so that `--help` answers at once.
"""

import importlib.metadata
import json
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from probe.config import CompareConfig, EmbedConfig, FinetuneConfig, FitLinearConfig, PredictConfig
from probe.errors import ProbeError
from probe.interrupt import run_interruptibly

_Command = (
    Annotated[EmbedConfig, subcommand("embed", prefix_name=False)]
    | Annotated[FitLinearConfig, subcommand("fit-linear", prefix_name=False)]
    | Annotated[FinetuneConfig, subcommand("finetune", prefix_name=False)]
    | Annotated[PredictConfig, subcommand("predict", prefix_name=False)]
    | Annotated[CompareConfig, subcommand("compare", prefix_name=False)]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments after the program's name; those of the process if None.
    Returns: the exit code, as the table in `probe.errors` has it.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--version"]:
        print(f"probe {importlib.metadata.version('probe-jax')}")
        return 0
    try:
        config = tyro.cli(
            _Command,  # type: ignore[arg-type]  # a union is a type form, which mypy has no name for yet
            prog="probe",
            description="Turn a pretrained vision backbone into a classifier that one can trust.",
            args=arguments,
        )
        result, text = run_interruptibly(lambda: _run(config))
        print(json.dumps(result, ensure_ascii=False) if config.json else text, flush=True)
    except BrokenPipeError:  # whoever read our output has enough: `probe predict … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ProbeError as err:
        print(f"probe: error: {err}", file=sys.stderr)
        return err.exit_code
    except SystemExit as stop:  # the parser's own: 0 after --help, 2 after a usage error
        return stop.code if isinstance(stop.code, int) else 2
    return 0


def _run(config: object) -> tuple[dict[str, Any], str]:
    """The verb's result, and the same as text for people."""
    match config:
        case EmbedConfig():
            from probe import embed

            result = embed.embed(config)
            return result, embed.describe(result)
        case FitLinearConfig():
            from probe import linear

            result = linear.fit_linear(config)
            return result, linear.describe(result)
        case FinetuneConfig():
            from probe import finetune

            result = finetune.finetune(config)
            return result, finetune.describe(result)
        case PredictConfig():
            from probe import predict

            result = predict.predict(config)
            return result, predict.describe(result)
        case CompareConfig():
            from probe import compare

            result = compare.compare(config)
            return result, compare.describe(result)
    raise AssertionError(f"no verb for {type(config).__name__}")


if __name__ == "__main__":
    sys.exit(main())
