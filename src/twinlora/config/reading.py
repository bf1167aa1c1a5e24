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


def _by_flag(cls: type[BaseModel]) -> dict[str, str]:
    """The fields whose flags have other names, by these: `json` for json_output."""
    return {
        given: name
        for name, field in cls.model_fields.items()
        for mark in field.metadata
        if isinstance(given := getattr(mark, "name", None), str)
    }


def read_recipe(path: Path, cls: type[BaseModel]) -> dict[str, Any]:
    """The options in a YAML recipe, typed as the fields of `cls`, by their names or their flags' names; dashes and
    underscores are the same.

    Raises ConfigError that names every option that is unknown or there twice, and every value of the wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
        given = yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"recipe {path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"recipe {path}: not readable as YAML: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"recipe {path}: expected `option: value` lines, found {type(given).__name__}")
    flags = _by_flag(cls)

    def name_of(key: object) -> str:
        name = str(key).replace("-", "_")
        return flags.get(name, name)

    node = yaml.compose(text, yaml.SafeLoader)  # `given` has the last one alone of those that are there twice
    assert isinstance(node, yaml.MappingNode)
    keys = [name_of(key.value) for key, _ in node.value]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"recipe {path}: {', '.join(twice)}: given more than once; keep one of them")
    given = {name_of(key): value for key, value in given.items()}
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
