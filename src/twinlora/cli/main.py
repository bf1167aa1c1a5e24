"""`twinlora VERB …`: find the verb, read its options from flags and recipe, run it, turn errors into exit statuses."""

from __future__ import annotations

import dataclasses
import importlib
import io
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from twinlora import __version__
from twinlora.errors import ConfigError, TwinloraError

__all__ = ["main"]

# verb, of one word or two: (module, class of its options in twinlora.config, one line of help)
_VERBS = {
    "demo": ("twinlora.cli.demo", "DemoOptions", "The whole story on the embedded model and data."),
    "doctor": ("twinlora.cli.doctor", "DoctorOptions", "This machine, the backend that runs, what is missing."),
    "plan": ("twinlora.cli.plan", "PlanOptions", "Which way fits, how long it takes, which to choose: MODEL."),
    "train": ("twinlora.cli.train", "TrainOptions", "Fine-tune with LoRA, QLoRA, or all weights."),
    "eval": ("twinlora.cli.eval", "EvalOptions", "Measure a model, with or without an adapter."),
    "data check": ("twinlora.cli.data_check", "DataCheckOptions", "What exactly would be trained: SOURCE… --model M."),
    "compare": ("twinlora.cli.compare", "CompareOptions", "Train by several methods and say which to choose."),
    "adapter inspect": (
        "twinlora.cli.adapter_inspect",
        "AdapterInspectOptions",
        "What an adapter is, what it does, and what can load it.",
    ),
    "adapter combine": (
        "twinlora.cli.adapter_combine",
        "AdapterCombineOptions",
        "Several adapters as one: DIR DIR … --output DIR.",
    ),
    "adapter compress": (
        "twinlora.cli.adapter_compress",
        "AdapterCompressOptions",
        "An adapter in a lower rank, and what that costs.",
    ),
    "merge": ("twinlora.cli.merge", "MergeOptions", "Fold an adapter into its base, and prove that it answers alike."),
    "export": (
        "twinlora.cli.export",
        "ExportOptions",
        "Write it for llama.cpp, bitsandbytes or PEFT, behind the same gate.",
    ),
    "chat": ("twinlora.cli.chat", "ChatOptions", "Talk to a model and switch adapters."),
    "serve": ("twinlora.cli.serve", "ServeOptions", "One base and many adapters over HTTP."),
}

# The list that takes what stands before any flag.
_FIRST = {"data check": "data", "adapter combine": "adapters"}


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<15} {line}" for verb, (_, _, line) in _VERBS.items())
    return (
        f"twinlora {__version__}: fine-tune language models with LoRA and QLoRA\n\n"
        f"usage: twinlora VERB [options]\n\n{verbs}\n\n"
        "twinlora VERB --help lists a verb's options; every verb takes --json and --config recipe.yaml"
    )


def parse_options(verb: str, arguments: list[str]) -> Any:
    """The options of `verb`: flags over a recipe over defaults. Raises ConfigError; SystemExit for bad flags."""
    import tyro

    from twinlora import config

    cls: Any = getattr(config, _VERBS[verb][1])
    lists = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is list}
    switches = {name for name, field in cls.model_fields.items() if {"on", "off"} <= set(get_args(field.annotation))}
    recipe, arguments = _normalise(_switched(arguments, switches), lists, first=_FIRST.get(verb))
    values = config.read_recipe(recipe, cls) if recipe else {}
    fields: list[tuple[str, Any, Any]] = []
    for name, field in sorted(cls.model_fields.items(), key=lambda item: not item[1].is_required()):
        kind: Any = Annotated[field.annotation, tyro.conf.arg(help=field.description), *field.metadata]
        default = values.get(name, field.get_default(call_default_factory=True))
        required = name not in values and field.is_required()
        settings: dict[str, Any] = {} if required else {"default_factory": lambda default=default: default}
        fields.append((name, kind, dataclasses.field(kw_only=True, **settings)))
    # A plain class for the parser: limits are checked below, with messages of our own.
    parsed: Any = tyro.cli(
        dataclasses.make_dataclass(cls.__name__, fields),
        args=arguments,
        prog=f"twinlora {verb}",
        description=f"{_VERBS[verb][2]} --config recipe.yaml gives options from a file; flags override it.",
    )
    # What was not given stays unset, for whoever chooses it.
    typed = {_name_of(argument.partition("=")[0]) for argument in arguments if argument.startswith("--")}
    given = {
        name: value
        for name, field in cls.model_fields.items()
        if (value := getattr(parsed, name)) != field.get_default(call_default_factory=True)
        or name in typed | values.keys()
        or field.is_required()
    }
    return config.validated(cls, given, where=f"twinlora {verb}")


def _name_of(flag: str) -> str:
    """`--no-double-quant` -> double_quant."""
    return flag.removeprefix("--").removeprefix("no-").replace("-", "_")


def _switched(arguments: list[str], switches: set[str]) -> list[str]:
    """`--x` alone is `--x on` where x can be on and off, and `--no-x` is `--x off`."""
    rest = []
    for argument, after in itertools.pairwise([*arguments, "--"]):
        name = argument.removeprefix("--").replace("-", "_")
        if argument.startswith("--no-") and name.removeprefix("no_") in switches:
            rest += [f"--{argument.removeprefix('--no-')}", "off"]
        else:
            rest += [argument, "on"] if name in switches and after.startswith("-") else [argument]
    return rest


def _normalise(arguments: list[str], lists: set[str], first: str | None = None) -> tuple[Path | None, list[str]]:
    """Cut out `--config FILE` and gather lists: `--x a,b`, `--x a b` and `--x a --x b` are the same.

    A path that exists is not split at its commas, nor is a regular expression within brackets. What comes before any
    flag, or after the one value of `--config`, belongs to the list `first`.
    """
    rest: list[str] = []
    gathered: dict[str, list[str]] = {}
    current, recipe = first, None
    for argument in arguments:
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            current = name if name in lists or name == "config" else None
            if current is None:
                rest.append(argument)
            else:
                gathered.setdefault(current, []).extend([value] if equals else [])
                current = first if equals and name == "config" else current
        elif current is None or argument == "-h":
            rest.append(argument)
        else:
            gathered.setdefault(current, []).append(argument)
            current = first if current == "config" else current
    if "config" in gathered:
        if len(gathered["config"]) != 1:
            raise ConfigError("--config: expected the path of one YAML recipe after it")
        recipe = Path(gathered.pop("config")[0])
    for name, values in gathered.items():
        rest += [f"--{name.replace('_', '-')}", *(part for value in values for part in _parts(value))]
    return recipe, rest


def _parts(value: str) -> list[str]:
    if Path(value).exists():
        return [value]
    return re.findall(r"(?:\\.|\[[^\]]*\]|\{[^}]*\}|[^,])+", value)  # [0-9,] and {1,2} of a pattern stay whole


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns the exit status: 0 done, 2 the user's input, 130/143 ended by a signal, 1 the rest."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_usage() + "\n")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        sys.stdout.write(f"twinlora {__version__}\n")
        return 0
    words = 2 if " ".join(arguments[:2]) in _VERBS else 1
    verb, rest = " ".join(arguments[:words]), arguments[words:]
    if verb not in _VERBS:
        import difflib

        longer = [known for known in _VERBS if known.startswith(f"{verb} ")]
        near = longer or difflib.get_close_matches(" ".join(arguments[:2]), _VERBS, n=1)
        near = near or difflib.get_close_matches(verb, _VERBS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        sys.stderr.write(f"error: unknown verb {verb!r}{hint}\n\n{_usage()}\n")
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        options = parse_options(verb, rest)
        module: Any = importlib.import_module(_VERBS[verb][0])
        module.run(options)
    except TwinloraError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_status
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
