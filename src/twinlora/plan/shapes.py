"""Shapes of well-known models by name, so that a plan needs no download: sizes alone, no weights and no tokenizer.

Each comes from the `config.json` of the checkpoint that it names, or from the table of a paper. `parameters` is the
count that the publisher gives; the tests build each shape and count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["SHAPES", "Shape"]


@dataclass(frozen=True)
class Shape:
    """Sizes of an architecture. `hub` is the checkpoint on the hub to train from, None where there is none."""

    name: str
    kind: str  # model_type of transformers
    parameters: int
    source: str
    hub: str | None
    values: dict[str, Any] = field(repr=False)

    def config(self) -> PretrainedConfig:
        """As transformers knows it."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.kind, **self.values)


# name: (hub id, parameters, hidden, feed-forward, layers, heads, key-value heads, size of a head, vocabulary, tied)
_Row = tuple[str, int, int, int, int, int, int, int, int, bool]
_LLAMA: dict[str, _Row] = {
    "llama2-7b": ("meta-llama/Llama-2-7b-hf", 6_738_415_616, 4096, 11008, 32, 32, 32, 128, 32000, False),
    "llama2-13b": ("meta-llama/Llama-2-13b-hf", 13_015_864_320, 5120, 13824, 40, 40, 40, 128, 32000, False),
    "llama2-70b": ("meta-llama/Llama-2-70b-hf", 68_976_648_192, 8192, 28672, 80, 64, 8, 128, 32000, False),
    "llama3-8b": ("meta-llama/Meta-Llama-3-8B", 8_030_261_248, 4096, 14336, 32, 32, 8, 128, 128256, False),
    "llama3-70b": ("meta-llama/Meta-Llama-3-70B", 70_553_706_496, 8192, 28672, 80, 64, 8, 128, 128256, False),
    "llama3.1-8b": ("meta-llama/Llama-3.1-8B", 8_030_261_248, 4096, 14336, 32, 32, 8, 128, 128256, False),
    "llama3.1-70b": ("meta-llama/Llama-3.1-70B", 70_553_706_496, 8192, 28672, 80, 64, 8, 128, 128256, False),
    "llama3.1-405b": ("meta-llama/Llama-3.1-405B", 405_853_388_800, 16384, 53248, 126, 128, 8, 128, 128256, False),
    "llama3.2-1b": ("meta-llama/Llama-3.2-1B", 1_235_814_400, 2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama3.2-3b": ("meta-llama/Llama-3.2-3B", 3_212_749_824, 3072, 8192, 28, 24, 8, 128, 128256, True),
    "llama3.3-70b": ("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496, 8192, 28672, 80, 64, 8, 128, 128256, False),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", 134_515_008, 576, 1536, 30, 9, 3, 64, 49152, True),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M", 361_821_120, 960, 2560, 32, 15, 5, 64, 49152, True),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384, 2048, 8192, 24, 32, 32, 64, 49152, True),
}
# arXiv 2302.13971, table 2; the feed-forward sizes are those of the published code (2/3 of 4 × hidden, to a multiple).
_LLAMA_1: dict[str, _Row] = {
    "llama-7b": ("", 6_738_415_616, 4096, 11008, 32, 32, 32, 128, 32000, False),
    "llama-13b": ("", 13_015_864_320, 5120, 13824, 40, 40, 40, 128, 32000, False),
    "llama-33b": ("", 32_528_943_616, 6656, 17920, 60, 52, 52, 128, 32000, False),
    "llama-65b": ("", 65_285_660_672, 8192, 22016, 80, 64, 64, 128, 32000, False),
}
_QWEN2: dict[str, _Row] = {
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", 494_032_768, 896, 4864, 24, 14, 2, 64, 151936, True),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B", 1_543_714_304, 1536, 8960, 28, 12, 2, 128, 151936, True),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B", 3_085_938_688, 2048, 11008, 36, 16, 2, 128, 151936, True),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", 7_615_616_512, 3584, 18944, 28, 28, 4, 128, 152064, False),
    "qwen2.5-14b": ("Qwen/Qwen2.5-14B", 14_770_033_664, 5120, 13824, 48, 40, 8, 128, 152064, False),
    "qwen2.5-32b": ("Qwen/Qwen2.5-32B", 32_763_876_352, 5120, 27648, 64, 40, 8, 128, 152064, False),
    "qwen2.5-72b": ("Qwen/Qwen2.5-72B", 72_706_203_648, 8192, 29568, 80, 64, 8, 128, 152064, False),
}
_QWEN3: dict[str, _Row] = {
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", 596_049_920, 1024, 3072, 28, 16, 8, 128, 151936, True),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", 1_720_574_976, 2048, 6144, 28, 16, 8, 128, 151936, True),
    "qwen3-4b": ("Qwen/Qwen3-4B", 4_022_468_096, 2560, 9728, 36, 32, 8, 128, 151936, True),
    "qwen3-8b": ("Qwen/Qwen3-8B", 8_190_735_360, 4096, 12288, 36, 32, 8, 128, 151936, False),
    "qwen3-14b": ("Qwen/Qwen3-14B", 14_768_307_200, 5120, 17408, 40, 40, 8, 128, 151936, False),
    "qwen3-32b": ("Qwen/Qwen3-32B", 32_762_123_264, 5120, 25600, 64, 64, 8, 128, 151936, False),
}
_MISTRAL: dict[str, _Row] = {
    "mistral-7b": ("mistralai/Mistral-7B-v0.1", 7_241_732_096, 4096, 14336, 32, 32, 8, 128, 32000, False),
    "mistral-nemo": (
        "mistralai/Mistral-Nemo-Base-2407", 12_247_782_400, 5120, 14336, 40, 32, 8, 128, 131072, False,
    ),
    "mistral-small-24b": (
        "mistralai/Mistral-Small-24B-Base-2501", 23_572_403_200, 5120, 32768, 40, 32, 8, 128, 131072, False,
    ),
}  # fmt: skip
_GEMMA2: dict[str, _Row] = {
    "gemma2-2b": ("google/gemma-2-2b", 2_614_341_888, 2304, 9216, 26, 8, 4, 256, 256000, True),
    "gemma2-9b": ("google/gemma-2-9b", 9_241_705_984, 3584, 14336, 42, 16, 8, 256, 256000, True),
    "gemma2-27b": ("google/gemma-2-27b", 27_227_128_320, 4608, 36864, 46, 32, 16, 128, 256000, True),
}
# From 4b on the checkpoint also sees pictures; here its text model alone.
_GEMMA3: dict[str, _Row] = {
    "gemma3-270m": ("google/gemma-3-270m", 268_098_176, 640, 2048, 18, 4, 1, 256, 262144, True),
    "gemma3-1b": ("google/gemma-3-1b-pt", 999_885_952, 1152, 6912, 26, 4, 1, 256, 262144, True),
    "gemma3-4b": ("google/gemma-3-4b-pt", 3_880_263_168, 2560, 10240, 34, 8, 4, 256, 262208, True),
    "gemma3-12b": ("google/gemma-3-12b-pt", 11_766_034_176, 3840, 15360, 48, 16, 8, 256, 262208, True),
    "gemma3-27b": ("google/gemma-3-27b-pt", 27_009_346_304, 5376, 21504, 62, 32, 16, 128, 262208, True),
}
_PHI: dict[str, _Row] = {
    "phi3-mini": ("microsoft/Phi-3-mini-4k-instruct", 3_821_079_552, 3072, 8192, 32, 32, 32, 96, 32064, False),
    "phi3-medium": ("microsoft/Phi-3-medium-4k-instruct", 13_960_238_080, 5120, 17920, 40, 40, 10, 128, 32064, False),
    "phi4": ("microsoft/phi-4", 14_659_507_200, 5120, 17920, 40, 40, 10, 128, 100352, False),
    "phi4-mini": ("microsoft/Phi-4-mini-instruct", 3_836_021_760, 3072, 8192, 32, 24, 8, 128, 200064, True),
}
# Feed-forward is that of one expert.
_MIXTRAL: dict[str, _Row] = {
    "mixtral-8x7b": ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704, 4096, 14336, 32, 32, 8, 128, 32000, False),
    "mixtral-8x22b": ("mistralai/Mixtral-8x22B-v0.1", 140_620_634_112, 6144, 16384, 56, 48, 8, 128, 32000, False),
}
_QWEN3_MOE: dict[str, _Row] = {
    "qwen3-30b-a3b": ("Qwen/Qwen3-30B-A3B", 30_532_122_624, 2048, 768, 48, 32, 4, 128, 151936, False),
    "qwen3-235b-a22b": ("Qwen/Qwen3-235B-A22B", 235_093_634_560, 4096, 1536, 94, 64, 4, 128, 151936, False),
}
# What else a family needs. Token ids that lie outside of a vocabulary would be refused.
_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_FAMILIES: list[tuple[str, dict[str, _Row], dict[str, Any]]] = [
    ("llama", _LLAMA, {}),
    ("llama", _LLAMA_1, {"max_position_embeddings": 2048}),
    ("qwen2", _QWEN2, {}),
    ("qwen3", _QWEN3, {}),
    ("mistral", _MISTRAL, {"sliding_window": None}),
    ("gemma2", _GEMMA2, {}),
    ("gemma3_text", _GEMMA3, {}),
    ("phi3", _PHI, {}),
    ("mixtral", _MIXTRAL, {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}),
    ("qwen3_moe", _QWEN3_MOE, {"num_experts": 128, "num_experts_per_tok": 8}),
]


def _rows() -> Iterator[Shape]:
    for kind, rows, extra in _FAMILIES:
        for name, (hub, count, hidden, inner, layers, heads, kv_heads, head_dim, vocabulary, tied) in rows.items():
            values = {
                "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
                "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "tie_word_embeddings": tied,
                "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size": inner,
            }  # fmt: skip
            if kind != "phi3":  # its class works the size of a head out
                values["head_dim"] = head_dim
            source = f"config.json of {hub}" if hub else "arXiv 2302.13971, table 2"
            yield Shape(name, kind, count, source, hub or None, _TOKENS | extra | values)
    gpt3 = {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048, "vocab_size": 50257}
    # Of the sparse attention in every other layer its table does not tell; dense attention has the same weights.
    yield Shape("gpt3-175b", "gpt2", 175_000_000_000, "arXiv 2005.14165, table 2.1", None, _TOKENS | gpt3)


SHAPES: dict[str, Shape] = {shape.name: shape for shape in _rows()}
