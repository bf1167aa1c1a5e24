"""Every option, once. Flags, recipe files and run records derive from these models; unknown keys are errors."""

from twinlora.config.groups import (
    AdapterOptions,
    DataOptions,
    ModelOptions,
    OptimizerOptions,
    Options,
    SourceOptions,
    TokenizerOptions,
)
from twinlora.config.reading import read_recipe, validated
from twinlora.config.values import parse_patterns, parse_ranges, parse_size
from twinlora.config.verbs import (
    AdapterInspectOptions,
    AttachOptions,
    ChatOptions,
    CompareOptions,
    DataCheckOptions,
    DemoOptions,
    DoctorOptions,
    EvalOptions,
    LoadOptions,
    ServeOptions,
    TrainOptions,
)

__all__ = [
    "AdapterInspectOptions",
    "AdapterOptions",
    "AttachOptions",
    "ChatOptions",
    "CompareOptions",
    "DataCheckOptions",
    "DataOptions",
    "DemoOptions",
    "DoctorOptions",
    "EvalOptions",
    "LoadOptions",
    "ModelOptions",
    "OptimizerOptions",
    "Options",
    "ServeOptions",
    "SourceOptions",
    "TokenizerOptions",
    "TrainOptions",
    "parse_patterns",
    "parse_ranges",
    "parse_size",
    "read_recipe",
    "validated",
]
