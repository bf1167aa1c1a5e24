"""The optimiser and its schedule.

AdamW is torch's. A parameter that is not float32 (full fine-tuning of a 16-bit model) gets a float32 master copy here,
which is what AdamW steps; a 16-bit weight alone would lose updates below half a unit in its last place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from twinlora.config import OptimizerOptions

__all__ = ["MasterAdamW", "learning_rate"]

_SCALER = "scaler"


def learning_rate(step: int, steps: int, options: OptimizerOptions) -> float:
    """Rate of optimiser step `step` (from 0) out of `steps`: linear warm-up, then the decay to 0 at `steps`."""
    warmup = min(options.warmup_steps, steps)
    if step < warmup:
        return options.lr * (step + 1) / warmup
    if options.scheduler == "constant":
        return options.lr
    done = (step - warmup) / max(1, steps - warmup)
    return options.lr * (0.5 * (1 + math.cos(math.pi * done)) if options.scheduler == "cosine" else 1 - done)


class MasterAdamW:
    """torch's AdamW over float32 masters of `parameters` (a float32 parameter is its own master).

    With `offload`, masters, moments and the update are the host's, whatever device the parameters are on. With
    `scaled`, for float16: losses are multiplied by a factor that keeps their gradients in range, and a step whose
    gradients overflow changes nothing but that factor.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        options: OptimizerOptions,
        *,
        scaled: bool = False,
        offload: bool = False,
    ) -> None:
        self.parameters = parameters
        self.masters = {name: self._master(p, offload=offload) for name, p in parameters.items()}
        self.updating = False  # in the midst of a step, which cannot be tried again
        device = next((p.device.type for p in parameters.values()), "cpu")
        self.scaler = torch.amp.GradScaler(device, enabled=scaled)
        self._adamw = torch.optim.AdamW(
            self._groups(options.lora_plus_ratio),
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            fused=True,
        )

    @staticmethod
    def _master(parameter: nn.Parameter, *, offload: bool) -> nn.Parameter:
        if offload:
            return nn.Parameter(_on_host(parameter.detach()))
        return parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())

    def _groups(self, ratio: float) -> list[dict[str, Any]]:
        """B apart from the rest, which learns `ratio` times as fast (LoRA+, arXiv 2402.12354)."""
        fast = [p for name, p in self.masters.items() if name.endswith("lora_B")] if ratio != 1 else []
        chosen = set(map(id, fast))
        rest = [p for p in self.masters.values() if id(p) not in chosen]
        return [{"params": group, "ratio": r} for group, r in ((rest, 1.0), (fast, ratio)) if group]

    def reserve(self) -> None:
        """Allocate all that a step holds, as torch would at the first: moments of 0, gradients of 0."""
        for master in self.masters.values():
            if not self._adamw.state[master]:
                zeros = {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
                step = torch.zeros((), dtype=torch.float32, device=master.device)
                self._adamw.state[master] = {"step": step} | zeros
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)

    def discard_gradients(self) -> None:
        """Forget what `backward` added since the last step."""
        for parameter in self.parameters.values():
            parameter.grad = None
        for master in self.masters.values():
            master.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` to those of the masters."""
        scaled: Tensor = self.scaler.scale(loss)
        scaled.backward()

    def step(self, lr: float, max_grad_norm: float) -> Tensor:
        """Clip, step at rate `lr`, clear the gradients; returns the gradient norm before clipping, float32 []."""
        self._pass_gradients_on()
        self.updating = True
        self.scaler.unscale_(self._adamw)
        norm = torch.nn.utils.clip_grad_norm_(self.masters.values(), max_grad_norm, foreach=True)
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["ratio"]
        self.scaler.step(self._adamw)
        self.scaler.update()
        self._adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name], non_blocking=True)
        self.updating = False
        return norm

    def _pass_gradients_on(self) -> None:
        """From the parameters to masters that are not the parameters themselves."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is parameter or parameter.grad is None:
                continue
            same = master.device == parameter.device
            master.grad = parameter.grad.float() if same else _on_host(parameter.grad)
            parameter.grad = None
        if any(p.is_cuda and not self.masters[name].is_cuda for name, p in self.parameters.items()):
            torch.cuda.synchronize()  # the copies above must have arrived

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name: masters, both moments, the step count."""
        out: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            out[f"master.{name}"] = master.detach()
            for key, value in self._adamw.state.get(master, {}).items():
                out[f"{key}.{name}"] = value
        if self.scaler.is_enabled():
            state = self.scaler.state_dict()
            out[_SCALER] = torch.tensor([state["scale"], state["_growth_tracker"]], dtype=torch.float64)
        return out

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_tensors`; the parameters get their values too. KeyError if one is missing."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[f"master.{name}"])
                if self.parameters[name] is not master:
                    self.parameters[name].copy_(master)
                state: dict[str, Any] = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}.{name}" in tensors:
                        state[key] = tensors[f"{key}.{name}"].to(master.device, copy=True)
                if state:
                    self._adamw.state[master] = state
        if self.scaler.is_enabled():
            scale, tracker = tensors[_SCALER].tolist()
            self.scaler.load_state_dict(self.scaler.state_dict() | {"scale": scale, "_growth_tracker": int(tracker)})


def _on_host(tensor: Tensor) -> Tensor:
    """A float32 copy in host memory, pinned if it comes from a GPU; to be waited for then."""
    host = torch.empty(tensor.shape, dtype=torch.float32, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
