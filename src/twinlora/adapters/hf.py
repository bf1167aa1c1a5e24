"""For trainers of others (transformers' Trainer, TRL): a model with adapters that saves and loads as they expect.

`follow_peft` overrides two things on one model, and nothing on its class or in transformers: `save_pretrained`, which
writes a PEFT directory, and what `load_state_dict` makes of such a file, so that `resume_from_checkpoint` and
`load_best_model_at_end` work.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from twinlora.adapters import files
from twinlora.adapters.lora import lora_layers, trainable_parameters, whole_modules
from twinlora.adapters.passport import Passport
from twinlora.errors import AdapterError

__all__ = ["follow_peft", "without_adapters"]

# The Trainer names its checkpoints so, and looks for the weights of a model that is not PEFT's under this name.
_CHECKPOINT, _TRAINER_WEIGHTS = r"checkpoint-\d+", "model.safetensors"


def follow_peft(model: PreTrainedModel, passport: Passport | None = None) -> None:
    """Let `model`, which has adapters, save itself as a PEFT directory with `passport`, and load one of its own shape.

    A directory named as the Trainer names its checkpoints also gets the weights as `model.safetensors`, a link, where
    the Trainer looks for them.
    """

    def save_pretrained(
        self: PreTrainedModel,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **_: Any,
    ) -> None:
        """Write the adapter to `save_directory`, in the PEFT format; what is about whole models has no meaning here."""
        if push_to_hub:
            raise AdapterError(f"push_to_hub is not supported: save, then type `hf upload NAME {save_directory}`")
        if state_dict is not None:
            raise AdapterError("sharded training (FSDP, DeepSpeed) of adapters by the Trainer is not supported")
        if is_main_process:
            directory = Path(save_directory)
            files.write_into(self, directory, self.name_or_path, passport)
            if re.fullmatch(_CHECKPOINT, directory.name):
                link = directory / _TRAINER_WEIGHTS
                link.unlink(missing_ok=True)
                link.symlink_to(files.WEIGHTS)

    model.save_pretrained = MethodType(save_pretrained, model)
    model.register_load_state_dict_pre_hook(_rename)
    model.register_load_state_dict_post_hook(_forgive_the_base)


def _rename(model: nn.Module, state_dict: dict[str, Tensor], *_: Any) -> None:
    """Turn a PEFT file's names into the model's own, in place. Raises AdapterError if a trained tensor is missing."""
    ours = _own_names(state_dict)
    if not ours or len(ours) < len(state_dict):
        return  # not an adapter
    layers = lora_layers(model)
    tensors = {name: state_dict.pop(key) for key, name in ours.items()}
    for name, layer in layers.items():
        if layer.start_A is not None and f"{name}.lora_A" in tensors:
            rank = layer.rank  # PiSSA is written as a LoRA of twice the rank
            a, b = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
            tensors |= {f"{name}.lora_A": a[:rank], f"{name}.start_A": a[rank:]}
            tensors |= {f"{name}.lora_B": b[:, :rank], f"{name}.start_B": -b[:, rank:]}
    missing = sorted(set(trainable_parameters(model)) - set(tensors))
    if missing:
        raise AdapterError(
            f"the checkpoint's adapter lacks {len(missing)} of the tensors that train here: {', '.join(missing[:5])}; "
            "attach with the options of the first run"
        )
    state_dict |= tensors


def _own_names(state_dict: dict[str, Tensor]) -> dict[str, str]:
    """Names in a PEFT file and what they are in the model."""
    names = {}
    for key in state_dict:
        if key.startswith(files.PREFIX):
            name = key.removeprefix(files.PREFIX)
            name = re.sub(r"\.lora_(A|B)\.weight$", r".lora_\1", name)
            names[key] = re.sub(r"\.lora_magnitude_vector(\.weight)?$", ".magnitude", name)
    return names


def _forgive_the_base(model: nn.Module, keys: Any) -> None:
    """The base is never in an adapter's file: if it alone is missing, nothing is."""
    trained = set(trainable_parameters(model))
    if not trained & set(keys.missing_keys) and not keys.unexpected_keys:
        keys.missing_keys.clear()


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The base of `model` as a model of its own, frozen, in eval mode, that shares every weight: the reference of DPO.

    It costs no memory. Raises AdapterError if whole modules train, since their base weights are gone.
    """
    whole = whole_modules(model)
    if whole:
        raise AdapterError(f"the base of {', '.join(whole)} is not kept: load the reference as a model of its own")
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    for name, layer in lora_layers(twin).items():
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, layer.base)
    for attribute in ("save_pretrained", "forward"):  # ours, and what a trainer of others may have put there
        twin.__dict__.pop(attribute, None)
    return twin.eval()
