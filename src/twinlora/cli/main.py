"""`twinlora VERB …`: finds the verb, reads its options from flags and recipe, runs it, turns errors into exit statuses."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from twinlora import __version__
from twinlora.errors import ConfigError, TwinloraError

__all__ = ["main"]

# verb: (module, class of its options in twinlora.config, one line of help)
_VERBS = {
    "demo": ("twinlora.cli.demo", "DemoOptions", "The whole story on the embedded model and data."),
    "doctor": ("twinlora.cli.doctor", "DoctorOptions", "This machine, the backend that runs, what is missing."),
    "train": ("twinlora.cli.train", "TrainOptions", "Fine-tune with LoRA, QLoRA, or all weights."),
    "eval": ("twinlora.cli.eval", "EvalOptions", "Measure a model, with or without an adapter."),
    "compare": ("twinlora.cli.compare", "CompareOptions", "Train by several methods and say which to choose."),
    "chat": ("twinlora.cli.chat", "ChatOptions", "Talk to a model and switch adapters."),
}


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<9} {line}" for verb, (_, _, line) in _VERBS.items())
    return (
        f"twinlora {__version__}: fine-tune language models with LoRA and QLoRA\n\n"
        f"usage: twinlora VERB [options]\n\n{verbs}\n\n"
        "twinlora VERB --help lists a verb's options; every verb takes --json and --config recipe.yaml"
    )


def _take_recipe(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Cut `--config FILE` out of the arguments."""
    rest, recipe = [], None
    iterator = iter(arguments)
    for argument in iterator:
        if argument == "--config":
            value = next(iterator, None)
            if value is None:
                raise ConfigError("--config: expected the path of a YAML recipe after it")
            recipe = Path(value)
        elif argument.startswith("--config="):
            recipe = Path(argument.partition("=")[2])
        else:
            rest.append("--json-output" if argument == "--json" else argument)
    return recipe, rest


def parse_options(verb: str, arguments: list[str]) -> Any:
    """The options of `verb` from flags over a recipe over defaults. Raises ConfigError; SystemExit for bad flags."""
    import tyro

    from twinlora import config

    cls: Any = getattr(config, _VERBS[verb][1])
    recipe, arguments = _take_recipe(arguments)
    values = config.read_recipe(recipe, cls) if recipe else {}
    checked: dict[str, Any] = {}
    for name, field in cls.model_fields.items():
        default = tyro.MISSING if field.is_required() else field.get_default(call_default_factory=True)
        checked[name] = values.get(name, default)
        if name in values and isinstance(default, Path):
            checked[name] = Path(values[name])
    if recipe:
        _check_recipe(cls, values, recipe)
    default = cls.model_construct(**checked)
    parsed = tyro.cli(
        cls, args=arguments, prog=f"twinlora {verb}", default=default, config=(tyro.conf.FlagCreatePairsOff,)[:0]
    )
    return config.validated(cls, parsed.model_dump(), where=f"twinlora {verb}")


def _check_recipe(cls: Any, values: dict[str, Any], recipe: Path) -> None:
    """Types of a recipe's own values; what it leaves out may come from flags."""
    from pydantic import ValidationError

    try:
        cls(**values)
    except ValidationError as error:
        wrong = [e for e in error.errors() if e["type"] != "missing"]
        if wrong:
            lines = "\n".join(f"  {'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in wrong)
            raise ConfigError(f"recipe {recipe}: {len(wrong)} problem(s)\n{lines}") from None


def main(argv: list[str] | None = None) -> int:
    """Run a verb; returns the exit status: 0 done, 2 the user's input, 130/143 interrupted after saving, 1 the rest."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        sys.stdout.write(_usage() + "\n")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        sys.stdout.write(f"twinlora {__version__}\n")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in _VERBS:
        import difflib

        near = difflib.get_close_matches(verb, _VERBS, n=1)
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
