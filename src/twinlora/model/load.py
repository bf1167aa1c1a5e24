"""From a directory, a GGUF file or a hub id to a model and its tokenizer, quantised on the way in (`quantizer.py`).

transformers owns names, renamings and architectures.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from twinlora import machine
from twinlora.errors import ModelError
from twinlora.model import attention, bnb4
from twinlora.model.lazy import Lazy, Stored
from twinlora.model.linear import FrozenLinear, QuantLinear, is_linear
from twinlora.model.quantizer import QuantizerConfig, quantize_layer
from twinlora.numerics.formats import Precision

__all__ = [
    "Source",
    "begins_as_gguf",
    "left_over",
    "load_model",
    "load_tokenizer",
    "pick_device",
    "pick_dtype",
    "precision_by_layer",
    "quiet",
    "resolve",
    "skeleton",
    "weight_bytes",
]

# Code is fetched for --trust-remote-code; without it transformers runs none.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]


@dataclass(frozen=True)
class Source:
    """A model on this machine: a checkpoint directory, or one GGUF file."""

    path: Path
    given: str

    @property
    def is_gguf(self) -> bool:
        """Whether `path` is a GGUF file."""
        return self.path.is_file()

    @property
    def load_arguments(self) -> dict[str, Any]:
        """What `from_pretrained` takes to load it."""
        if not self.is_gguf:
            return {"pretrained_model_name_or_path": str(self.path)}
        return {"pretrained_model_name_or_path": str(self.path.parent), "gguf_file": self.path.name}

    def weight_files(self) -> list[Path]:
        """The files that transformers reads weights from, sorted. Raises ModelError for a broken index."""
        single, index = self.path / "model.safetensors", self.path / "model.safetensors.index.json"
        if self.is_gguf or single.is_file():
            return [self.path if self.is_gguf else single]
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(
                f"model {self.given}: neither model.safetensors nor a readable {index.name} ({error}); fetch it again"
            ) from error
        missing = sorted(name for name in names if not (self.path / name).is_file())
        if missing:
            raise ModelError(f"model {self.given}: {index.name} names files that are not here: {', '.join(missing)}")
        return sorted(self.path / name for name in names)


def begins_as_gguf(path: Path) -> bool:
    """Whether a file is GGUF by what it begins with: in the hub's cache it has no name of its own."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def resolve(model: str, *, weights: bool = True) -> Source:
    """Find `model`: a directory, a .gguf file, or a hub id, which is fetched. Raises ModelError.

    Without `weights` what the tokenizer needs is enough.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"model {model}: no config.json in this directory; expected a Hugging Face checkpoint")
        return _checkpoint(path.resolve(), model, weights)
    if path.is_file():
        if not begins_as_gguf(path):
            raise ModelError(
                f"model {model}: not a GGUF file; expected a checkpoint directory, a GGUF file or a hub id"
            )
        return Source(path.resolve(), model)
    if model.count("/") != 1 or model.startswith((".", "/", "~")) or model.endswith(".gguf"):
        raise ModelError(f"model {model}: no such directory or file; expected one, or a hub id such as owner/name")
    from huggingface_hub import snapshot_download

    try:
        patterns = _HUB_FILES if weights else [pattern for pattern in _HUB_FILES if pattern != "*.safetensors"]
        fetched = Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(
            f"model {model}: not a local path, and the hub did not give it ({type(error).__name__}: {error}); "
            "check the name, the network, HF_TOKEN, or give a local directory"
        ) from error
    return _checkpoint(fetched, model, weights)


def _checkpoint(directory: Path, given: str, weights: bool) -> Source:
    """A checkpoint directory as a Source. Raises ModelError for pickled weights and a damaged config.json."""
    if (directory / "config.json").is_file():
        bnb4.read_config(directory, given)
    if weights and not list(directory.glob("*.safetensors")):
        raise ModelError(f"model {given}: it has no *.safetensors; pickled checkpoints are never read")
    return Source(directory, given)


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one. Raises ModelError for a device this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"device {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"device {name}: this torch sees no GPU; use --device cpu, or install a CUDA build of torch")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ModelError(f"device {name}: this torch sees {last + 1} GPU(s); expected cuda:0 to cuda:{last}")
    return device


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str | None]:
    """The type `name`, or for `auto` the best one for `device`, and if that was a choice the reason in words."""
    if name != "auto":
        return getattr(torch, name), None
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return (torch.bfloat16, None) if native else (torch.float16, "float16: this GPU has no bfloat16 arithmetic")
    narrow, wide = machine.product_rates(torch.bfloat16, torch.float32)
    if narrow >= wide:
        return torch.bfloat16, None
    return torch.float32, f"float32: this CPU multiplies at {wide / 1e9:.0f} GFLOP/s, in bfloat16 at {narrow / 1e9:.0f}"


def load_model(
    source: Source,
    *,
    quantize: Precision | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    on_quantized: Callable[[str, Tensor, QuantLinear], None] | None = None,
) -> PreTrainedModel:
    """The causal language model of `source`, frozen, in eval mode, with our attention where the architecture takes it.

    With `quantize`, linear layers become QuantLinear while the checkpoint streams by, all in one format, or as a map
    says that names each layer's format or "16bit"; embeddings, norms and head keep `dtype`. A GGUF file is dequantised
    to `dtype` first. The codes of a bitsandbytes NF4 checkpoint are taken as they are; without `quantize`, or where the
    map says "16bit", they are dequantised. `on_quantized` sees each such layer's name, its weight before, and what it
    became. Raises ModelError, with the tensors that are wrong.
    """
    attention.register()
    arguments: dict[str, Any] = source.load_arguments | {"dtype": dtype, "trust_remote_code": trust_remote_code}
    arguments |= {"ignore_mismatched_sizes": True, "output_loading_info": True}  # we refuse them ourselves, by name
    config = QuantizerConfig(quantize, on_quantized)
    if source.is_gguf:
        arguments |= _gguf_arguments()
    elif quantize is not None:
        arguments["quantization_config"] = config
    stored = not source.is_gguf and bnb4.is_stored(source.path, source.given)
    try:
        if source.is_gguf or (quantize is None and not stored):
            model, info = quiet(AutoModelForCausalLM.from_pretrained, **arguments)
        else:
            model, info = quiet(_load_by_tensor, **arguments, stored=config if stored else None)
    except (ValueError, OSError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"model {source.given}: could not be loaded: {error}") from error
    unread = [f"{name}: its 4-bit weight fits no layer" for name in config.stored or ()] if quantize else []
    _refuse_incomplete(source, info, config.problems + unread + left_over(model, info.get("unexpected_keys", ())))
    if source.is_gguf:
        config.look_at(model)
        for name in config.formats:
            quantize_layer(model, name, model.get_submodule(name).weight.detach(), config)
    attention.choose(model)
    model.name_or_path = model.config._name_or_path = source.given  # not the directory that a hub's copy lies in
    model.to(device)
    return model.requires_grad_(False).eval()


def _load_by_tensor(
    pretrained_model_name_or_path: str,
    *,
    trust_remote_code: bool,
    stored: QuantizerConfig | None = None,
    **arguments: Any,
) -> Any:
    """What AutoModelForCausalLM.from_pretrained does, over Lazy tensors. `stored` takes in what is in 4 bits."""
    path = Path(pretrained_model_name_or_path)
    model = skeleton(Source(path, str(path)), trust_remote_code=trust_remote_code)
    kind, config = type(model), model.config
    tensors: dict[str, Lazy] = {}
    for name in Source(path, str(path)).weight_files():
        with safe_open(name, framework="pt") as file:
            tensors |= {key: Lazy(name, key) for key in file.keys()}  # noqa: SIM118  # not a dict
    state: dict[str, Any] = {key: tensor for key, tensor in tensors.items() if not bnb4.is_part(key)}
    if stored is not None:
        names = [name.removesuffix(bnb4.MARK) for name in tensors if name.endswith(bnb4.MARK)]
        stored.stored = {n: functools.partial(bnb4.unpack, n, lambda key: tensors[key][...]) for n in names}
        state |= {name: Stored(read) for name, read in stored.stored.items()}
    loaded = kind.from_pretrained(None, config=config, state_dict=state, **arguments)
    if (path / "generation_config.json").is_file():
        loaded[0].generation_config = GenerationConfig.from_pretrained(path)
    return loaded


def _gguf_arguments() -> dict[str, Any]:
    """transformers from 5.2x wants to be told to dequantise; earlier versions always do."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def quiet(function: Any, **arguments: Any) -> Any:
    """Run without transformers' own progress bars and warnings; what they would say, we raise."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        return function(**arguments)
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def left_over(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """Tensors of the checkpoint below a linear layer that has no place for them: without them it computes otherwise.

    Whatever else transformers did not expect (rotary tables, parts of another head) it leaves out on purpose.
    """
    linears = tuple(f"{n}." for n, m in model.named_modules() if is_linear(m) or isinstance(m, FrozenLinear))
    known = set(model.state_dict())  # a tied head may be stored as well
    lost = [key for key in sorted(keys) if key not in known and key.startswith(linears)]
    return [f"left over: {key}, for which the model as config.json describes it has no place" for key in lost]


def _refuse_incomplete(source: Source, info: dict[str, Any], problems: list[str]) -> None:
    problems = problems + [f"missing: {name}" for name in sorted(info.get("missing_keys", ()))]
    for name, found, expected in sorted(info.get("mismatched_keys", ())):
        problems.append(f"{name}: checkpoint has {tuple(found)}, the model expects {tuple(expected)}")
    problems += map(str, info.get("error_msgs") or ())
    if problems:
        shown = "\n  ".join(problems[:20])
        raise ModelError(f"model {source.given}: {len(problems)} tensor(s) could not be loaded\n  {shown}")


def skeleton(source: Source, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of `source` without its weights: modules and shapes on the meta device. Raises ModelError."""
    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(**source.load_arguments, **trust)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **trust)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"model {source.given}: could not be loaded: {error}") from error
    return model


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`, with a pad token (the end-of-text token where the model names none)."""
    try:
        tokenizer = quiet(AutoTokenizer.from_pretrained, **source.load_arguments, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"model {source.given}: its tokenizer could not be loaded: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def precision_by_layer(model: nn.Module) -> dict[str, int]:
    """How many linear layers are stored how: `{"nf4-64-dq256": 210, "bfloat16": 1}`."""
    counts: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, FrozenLinear):
            counts[module.precision] = counts.get(module.precision, 0) + 1
        elif is_linear(module):
            name = str(module.weight.dtype).removeprefix("torch.")
            counts[name] = counts.get(name, 0) + 1
    return counts


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all frozen and trained weights, tied ones once, adapters not counted."""
    return sum(p.nbytes for name, p in model.named_parameters() if ".lora_" not in name)
