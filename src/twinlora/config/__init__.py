"""Every option, once. Flags, recipe files and run records derive from these models; unknown keys are errors."""

from twinlora.config.export import (
    AdapterCombineOptions,
    AdapterCompressOptions,
    ArtefactOptions,
    ExportOptions,
    MergeOptions,
    RankOptions,
)
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
    TrainOptions,
)

__all__ = [
    "AdapterCombineOptions",
    "AdapterCompressOptions",
    "AdapterInspectOptions",
    "AdapterOptions",
    "ArtefactOptions",
    "AttachOptions",
    "ChatOptions",
    "CompareOptions",
    "DataCheckOptions",
    "DataOptions",
    "DemoOptions",
    "DoctorOptions",
    "EvalOptions",
    "ExportOptions",
    "LoadOptions",
    "MergeOptions",
    "ModelOptions",
    "OptimizerOptions",
    "Options",
    "RankOptions",
    "SourceOptions",
    "TokenizerOptions",
    "TrainOptions",
    "parse_patterns",
    "parse_ranges",
    "parse_size",
    "read_recipe",
    "validated",
]
