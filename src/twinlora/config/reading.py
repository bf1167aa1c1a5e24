"""From given values and recipe files to options, with every problem in one error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from twinlora.errors import ConfigError

__all__ = ["read_recipe", "validated"]

T = TypeVar("T", bound=BaseModel)


def validated(cls: type[T], values: dict[str, Any], *, where: str = "options") -> T:
    """`cls(**values)`; every problem in one ConfigError that names the option, what it got and what was expected."""
    try:
        return cls(**values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"]) or "options"
            got = (
                ""
                if problem["type"] in ("missing", "value_error") or not problem["loc"]
                else f" (got {problem['input']!r})"
            )
            lines.append(f"  {name}: {problem['msg'].removeprefix('Value error, ')}{got}")
        known = f"\n  known options: {', '.join(cls.model_fields)}" if "Extra inputs" in str(error) else ""
        raise ConfigError(f"{where}: {len(lines)} problem(s)\n" + "\n".join(lines) + known) from None


def read_recipe(path: Path, cls: type[BaseModel]) -> dict[str, Any]:
    """The options in a YAML recipe, typed as the fields of `cls`; dashes and underscores are the same.

    Raises ConfigError that names every unknown option and every value of the wrong type.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"recipe {path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"recipe {path}: not readable as YAML: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"recipe {path}: expected `option: value` lines, found {type(given).__name__}")
    given = {str(key).replace("-", "_"): value for key, value in given.items()}
    unknown = sorted(set(given) - set(cls.model_fields))
    if unknown:
        raise ConfigError(
            f"recipe {path}: unknown option(s) {', '.join(unknown)}; known: {', '.join(cls.model_fields)}"
        )
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for name, value in given.items():
        field = cls.model_fields[name]
        try:
            kind: Any = Annotated[field.annotation, *(field.metadata or [None])]
            values[name] = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            wrong += [f"  {name}: {problem['msg']} (got {problem['input']!r})" for problem in error.errors()]
    if wrong:
        raise ConfigError(f"recipe {path}: {len(wrong)} problem(s)\n" + "\n".join(wrong))
    return values
