"""What other programs load of an adapter, by their own rules: vLLM 0.3x, llama.cpp, PEFT and transformers.

`refused` says why not, and which options would have made it loadable; `planned` asks before anything is trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from twinlora.adapters.files import AdapterFile, usual
from twinlora.adapters.targets import LoraConfig, resolve_modules, resolve_targets
from twinlora.config import AdapterOptions

__all__ = ["GGUF_MODELS", "VLLM_RANKS", "Refusal", "Traits", "found_in", "nearest", "planned", "refused", "setting"]

# The values that vLLM's --max-lora-rank takes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# The kinds of models (transformers' `model_type`) that export writes for llama.cpp.
GGUF_MODELS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


@dataclass(frozen=True)
class Traits:
    """What the rules look at.

    `told`: the one scale that r and lora_alpha of the configuration stand for; `unsaid`: keys that it lacks; `tied`:
    whether the base's head is known to be its embedding.
    """

    ranks: dict[str, int]
    scales: dict[str, float]
    told: float
    dora: bool
    saved: list[str]
    unsaid: list[str] = field(default_factory=list)
    tied: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why a program does not load an adapter as it was trained, and by which options it would; None: by none."""

    reason: str
    remedy: str | None = None  # dora, modules, rank, scales; an adapter on the head is never ours


def refused(program: str, traits: Traits) -> list[Refusal]:
    """The reasons of vllm, llama.cpp, peft or transformers; the last two load everything that is saved here."""
    if program in ("peft", "transformers"):
        return []
    found = [Refusal(f"adapter_config.json lacks {key}") for key in traits.unsaid if program == "vllm"]
    if traits.dora:
        found.append(Refusal("no DoRA", "dora"))
    if traits.saved:
        found.append(Refusal(f"no modules_to_save ({', '.join(traits.saved)})", "modules"))
    on_head = any(name.rpartition(".")[2] == "lm_head" for name in traits.ranks)
    if program == "llama.cpp":  # scales of layers that differ are folded into B when the file is written
        tied = Refusal("no adapter on a head that is tied to the embedding")
        return [*found, tied] if on_head and traits.tied else found
    if on_head:
        found.append(Refusal("no adapter on lm_head"))
    highest = max(traits.ranks.values(), default=1)
    if highest > VLLM_RANKS[-1]:
        found.append(Refusal(f"rank {highest} is above its limit of {VLLM_RANKS[-1]}", "rank"))
    off = sum(abs(scale - traits.told) > 1e-6 * traits.told for scale in traits.scales.values())
    if off:  # it takes r and lora_alpha alone, and says nothing
        what = f"would scale {off} of {len(traits.scales)} layers wrongly: it ignores rank_pattern and alpha_pattern"
        found.append(Refusal(what, "scales"))
    return found


def setting(program: str | None, traits: Traits) -> str:
    """What must be set there to load it."""
    if program == "vllm":
        return f"--max-lora-rank {next(step for step in VLLM_RANKS if step >= max(traits.ranks.values(), default=1))}"
    return {"transformers": "with peft installed", "llama.cpp": "as GGUF, by twinlora export --to gguf-lora"}.get(
        program or "", ""
    )


def planned(model: nn.Module, options: AdapterOptions) -> Traits:
    """The traits of what `options` would train on `model`, which may be on the meta device, as it would be saved."""
    lora = LoraConfig.from_options(options)
    layers = {name: lora.layer(name) for name in resolve_targets(model, lora)}
    doubled = 2 if options.init == "pissa" else 1
    ranks = {name: layer.rank * doubled for name, layer in layers.items()}
    scales = {name: layer.scale for name, layer in layers.items()}
    rank, _ = usual(ranks)
    alpha, _ = usual({name: round(scales[name] * ranks[name], 9) for name in layers})
    return Traits(ranks, scales, (alpha or 8) / (rank or 8), options.dora, resolve_modules(model, lora))


def found_in(adapter: AdapterFile, *, tied: bool = False) -> Traits:
    """The traits of an adapter on disk."""
    o, configs = adapter.options, adapter.configs
    alpha, rank = o.get("lora_alpha", 8), o.get("r", 8)
    return Traits(
        ranks={name: config.rank for name, config in configs.items()},
        scales={name: config.scale for name, config in configs.items()},
        told=alpha / (rank**0.5 if o.get("use_rslora") else rank),
        dora=bool(adapter.magnitudes),
        saved=list(adapter.modules),
        unsaid=[key for key in ("r", "lora_alpha", "target_modules") if key not in o],
        tied=tied,
    )


def nearest(refusals: list[Refusal], options: AdapterOptions) -> dict[str, Any]:
    """The fewest options to change so that a program loads it."""
    changes: dict[str, Any] = {}
    remedies = {refusal.remedy for refusal in refusals}
    if "dora" in remedies:
        changes["dora"] = False
    if "modules" in remedies:
        changes["modules_to_save"] = []
    highest = VLLM_RANKS[-1] // (2 if options.init == "pissa" else 1)
    ranks = {name: int(value) for name, _, value in (entry.rpartition("=") for entry in options.rank_pattern)}
    if "rank" in remedies:
        changes["rank"] = min(options.rank, highest)
        ranks = {name: min(rank, highest) for name, rank in ranks.items()}
        if options.rank_pattern:
            changes["rank_pattern"] = [f"{name}={rank}" for name, rank in ranks.items()]
    if "scales" in remedies or ("rank" in remedies and ranks):  # ranks may differ if alphas follow them
        power, rank = (0.5 if options.rslora else 1.0), changes.get("rank", options.rank)
        changes["alpha_pattern"] = [f"{n}={options.alpha * (r / rank) ** power:g}" for n, r in ranks.items()]
    return changes
