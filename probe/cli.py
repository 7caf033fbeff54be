"""The command line: argv to config, config to one call, its result to stdout, an error to an exit code.

jax is imported inside the verb, so that `--help` answers at once. With --json stdout gets one object, also of an error:
the result, or {"error": {"kind", "exit_code", "message"}}, and "schema_version", which grows when a field of either
goes or changes its meaning.
"""

import contextlib
import dataclasses
import difflib
import importlib.metadata
import io
import json
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import tyro
from tyro.conf import subcommand
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

from probe import config as configs
from probe import distributed, provenance
from probe.compiled import keep_compiled_programs
from probe.errors import ConfigError, ProbeError
from probe.interrupt import run_interruptibly
from probe.pages import restart_with_huge_pages
from probe.storage import locate

_Cache = (
    Annotated[configs.CacheLsConfig, subcommand("ls", prefix_name=False)]
    | Annotated[configs.CacheVerifyConfig, subcommand("verify", prefix_name=False)]
    | Annotated[configs.CacheMergeConfig, subcommand("merge", prefix_name=False)]
    | Annotated[configs.CachePruneConfig, subcommand("prune", prefix_name=False)]
    | Annotated[configs.CacheRmConfig, subcommand("rm", prefix_name=False)]
    | Annotated[configs.CacheExportConfig, subcommand("export", prefix_name=False)]
    | Annotated[configs.CacheImportConfig, subcommand("import", prefix_name=False)]
)
_Command = (
    Annotated[configs.EmbedConfig, subcommand("embed", prefix_name=False)]
    | Annotated[configs.FitLinearConfig, subcommand("fit-linear", prefix_name=False)]
    | Annotated[configs.FinetuneConfig, subcommand("finetune", prefix_name=False)]
    | Annotated[configs.LaunchConfig, subcommand("launch", prefix_name=False)]
    | Annotated[configs.ZeroShotConfig, subcommand("zero-shot", prefix_name=False)]
    | Annotated[configs.PredictConfig, subcommand("predict", prefix_name=False)]
    | Annotated[configs.ExportConfig, subcommand("export", prefix_name=False)]
    | Annotated[configs.ServeConfig, subcommand("serve", prefix_name=False)]
    | Annotated[configs.CompareConfig, subcommand("compare", prefix_name=False)]
    | Annotated[configs.ReportConfig, subcommand("report", prefix_name=False)]
    | Annotated[configs.DoctorConfig, subcommand("doctor", prefix_name=False)]
    | Annotated[configs.AuditConfig, subcommand("audit", prefix_name=False)]
    | Annotated[configs.DemoConfig, subcommand("demo", prefix_name=False)]
    | Annotated[_Cache, subcommand("cache", description="List, verify, join and exchange caches.", prefix_name=False)]
)

_OPTIONAL = ConstructorRegistry()


@_OPTIONAL.primitive_rule
def _optional(option: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None:
    """An option that may be left out is read as its own type: the word None is not a value for it."""
    inner = [kind for kind in get_args(option.type) if kind is not type(None)]
    if option.type_origin not in (types.UnionType, Union) or len(inner) != 1:
        return None
    spec = _OPTIONAL.get_primitive_spec(PrimitiveTypeInfo.make(inner[0], option.markers))
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return spec
    return dataclasses.replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: [] if value is None else spec.str_from_instance(value),
    )


@_OPTIONAL.primitive_rule
def _path(option: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """A path may be an address, s3://bucket/folder, of which pathlib would keep one slash."""
    if option.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: locate(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


_SCHEMA_VERSION = 1
_COMPLETION = "--print-completion"
_SHELLS = ("bash", "zsh", "fish")
_VERBOSE = {"-v", "--verbose"}

_Verb = Callable[[Any], dict[str, Any]]  # config -> result as JSON values
_Describe = Callable[[dict[str, Any]], str]  # the result as text for people


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments after the program's name; those of the process if None.
    Returns: the exit code, as the table in `probe.errors` has it.
    """
    arguments, is_verbose = _without_verbose(list(sys.argv[1:] if argv is None else argv))
    if argv is None and arguments[:1] == ["finetune"] and not {"-h", "--help"} & set(arguments):
        restart_with_huge_pages()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a λ must not end a finished run
    if arguments == ["--version"]:
        print(f"probe {importlib.metadata.version('probe-jax')}")
        return 0
    if os.environ.get("NO_COLOR"):
        tyro._experimental_options["ansi_codes"] = False
    try:
        config = _parse(arguments)
        if is_verbose:
            print(f"options: {json.dumps(configs.to_json(config))}", file=sys.stderr)
        provenance.set_command(arguments)
        result, text = run_interruptibly(lambda: _run(config))
        if distributed.is_first() and (config.json or text):
            print(_json(result) if config.json else text, flush=True)
    except BrokenPipeError:  # whoever read our output has enough: `probe predict … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ProbeError as err:
        if is_verbose:
            traceback.print_exc()
        print(f"probe: error: {err}", file=sys.stderr)
        _tell_error(arguments, err)
        return err.exit_code
    except SystemExit as stop:  # the parser's own: 0 after --help, 2 after a usage error
        code = 0 if stop.code is None else stop.code if isinstance(stop.code, int) else 2
        if code:
            _tell_error(arguments, ConfigError("the command line cannot be read; what is wrong with it is on stderr"))
        return code
    finally:
        provenance.set_command(None)  # whoever calls from Python next was not called by this line
    return 0


def _without_verbose(arguments: list[str]) -> tuple[list[str], bool]:
    """The arguments but -v and --verbose, which go with any verb, and whether one was there; what follows two dashes is
    another command's."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own = [word for word in arguments[:end] if word not in _VERBOSE]
    return own + arguments[end:], len(own) < end


def _parse(arguments: list[str]) -> Any:
    """The config that the command line asks for.

    Raises: ConfigError for a verb that there is not; SystemExit, after help, completions or a usage error were printed.
    """
    if arguments[:1] == [_COMPLETION]:
        if len(arguments) != 2 or arguments[1] not in _SHELLS:
            raise ConfigError(f"{_COMPLETION} takes one of {', '.join(_SHELLS)}")
        arguments = ["--tyro-print-completion", arguments[1]]
    _require_verb(arguments)
    return tyro.cli(
        _Command,  # type: ignore[arg-type]  # a union is a type form, which mypy has no name for yet
        prog="probe",
        description="Turn a pretrained vision backbone into a classifier that one can trust.\n\n"
        f"Also: probe --version; probe VERB … -v, which tells on stderr the options as they are understood, and of an "
        f"error where it arose; probe {_COMPLETION} {'|'.join(_SHELLS)}, for the shell to read when it starts.",
        args=arguments,
        registry=_OPTIONAL,
    )


def _require_verb(arguments: list[str]) -> None:
    """Raises ConfigError for a verb that there is not: the parser would answer to a --help behind it with its own."""
    known: Any = _Command
    for position, word in enumerate(arguments):
        if not (choices := _verbs(known)) or word.startswith("-"):
            return
        if word not in choices:
            where = " ".join(["probe", *arguments[:position]])
            like = difflib.get_close_matches(word, choices, n=1)
            hint = f"did you mean `{where} {like[0]}`? There are" if like else "there are"
            raise ConfigError(f"{where} has no verb {word!r}: {hint} {', '.join(choices)}")
        known = choices[word]


def _verbs(command: Any) -> dict[str, Any]:
    """The verbs of a union of commands, and what each of them leads to."""
    members = get_args(command) if isinstance(command, types.UnionType) or get_origin(command) is Union else ()
    return {get_args(member)[1].name: get_args(member)[0] for member in members}


def _json(value: dict[str, Any]) -> str:
    return json.dumps({"schema_version": _SCHEMA_VERSION, **value})


def _tell_error(arguments: list[str], err: ProbeError) -> None:
    """Whoever asked for JSON reads of the error there, too."""
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if "--json" in own and distributed.is_first():
        told = {"kind": type(err).__name__, "exit_code": err.exit_code, "message": str(err)}
        with contextlib.suppress(BrokenPipeError):  # whoever read our output has enough
            print(_json({"error": told}), flush=True)


def _run(config: object) -> tuple[dict[str, Any], str]:
    keep_compiled_programs()
    verb, describe = _verb_of(config)
    result = verb(config)
    text = describe(result)
    if isinstance(config, configs.FitLinearConfig | configs.FinetuneConfig):
        text += f"\nsaved in {config.out}: classify with `probe predict {config.out} IMAGES`"
        if (page := config.out / "report.html").exists():
            text += f", look at {page}"
    return result, text


def _verb_of(config: object) -> tuple[_Verb, _Describe]:
    match config:
        case configs.EmbedConfig():
            from probe import embed

            return embed.embed, embed.describe
        case configs.FitLinearConfig():
            from probe import linear

            return linear.fit_linear, linear.describe
        case configs.FinetuneConfig():
            from probe import finetune

            return finetune.finetune, finetune.describe
        case configs.LaunchConfig():
            from probe import launch

            return launch.launch, launch.describe
        case configs.ZeroShotConfig():
            from probe import zero_shot

            return zero_shot.zero_shot, zero_shot.describe
        case configs.PredictConfig():
            from probe import predict

            return predict.predict, predict.describe
        case configs.ExportConfig():
            from probe import export

            return export.export, export.describe
        case configs.ServeConfig():
            from probe import serve

            return serve.serve, serve.describe
        case configs.CompareConfig():
            from probe import compare

            return compare.compare, compare.describe
        case configs.AuditConfig():
            from probe import audit

            return audit.audit, audit.describe
        case configs.ReportConfig():
            from probe import report

            return report.report, report.describe
        case configs.DoctorConfig():
            from probe import doctor

            return doctor.doctor, doctor.describe
        case configs.DemoConfig():
            from probe import demo

            return demo.demo, demo.describe
        case configs.CacheLsConfig():
            from probe import cache_tools

            return cache_tools.ls, cache_tools.describe_ls
        case configs.CacheVerifyConfig():
            from probe import cache_tools

            return cache_tools.verify, cache_tools.describe_verify
        case configs.CacheMergeConfig():
            from probe import cache_tools

            return cache_tools.merge, cache_tools.describe_merge
        case configs.CachePruneConfig():
            from probe import cache_tools

            return cache_tools.prune, cache_tools.describe_prune
        case configs.CacheRmConfig():
            from probe import cache_tools

            return cache_tools.rm, cache_tools.describe_rm
        case configs.CacheExportConfig():
            from probe import exchange

            return exchange.export_cache, exchange.describe_export
        case configs.CacheImportConfig():
            from probe import exchange

            return exchange.import_features, exchange.describe_import
    raise AssertionError(f"no verb for {type(config).__name__}")


if __name__ == "__main__":
    sys.exit(main())
