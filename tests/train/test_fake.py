"""The whole training path on tensors without contents: every op, in the shapes of large models, in seconds."""

import contextlib
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.test_loop import options
from twinlora.data.packing import make_batch
from twinlora.model import swap
from twinlora.model.attention import Layout
from twinlora.numerics import cuda, ops
from twinlora.reporter import Reporter
from twinlora.train.inputs import read_inputs
from twinlora.train.notes import Notes
from twinlora.train.offload import HostActivations
from twinlora.train.optim import MasterAdamW
from twinlora.train.prepare import prepare
from twinlora.train.step import train_step

CPU = torch.device("cpu")


@pytest.fixture
def models(monkeypatch):
    """benchmarks/gpu_models.py, which makes models without a checkpoint."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import gpu_models

    return gpu_models


class Used(TorchDispatchMode):
    """Counts our ops, and runs those of the CUDA backend as that backend does, but for its Triton kernels."""

    def __init__(self, redirect=True):
        super().__init__()
        self.counts, self.redirect, self.inside = {}, redirect, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, rest = str(func).partition(".")
        name = rest.partition(".")[0]
        self.inside[name] = self.inside.get(name, 0) + 1
        if space == "twinlora":
            self.counts[name] = self.counts.get(name, 0) + 1
            if self.redirect and name in ("attention", "attention_backward"):
                with self:
                    return getattr(cuda, name)(*args)
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("rides", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_qlora_step(tiny, data_file, tmp_path, rides, dtype, monkeypatch):
    monkeypatch.setattr(ops, "adds_products", lambda device: rides)
    given = options(tiny, data_file, tmp_path / "r", method="qlora")
    inputs = read_inputs(given, Notes(Reporter()))
    made = prepare(given, inputs, dtype, torch.device("cpu"), Notes(Reporter()))
    batch = make_batch(inputs.examples[:3], 400, packed=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in made.model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(mode.from_tensor(p.detach()), p.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else mode.from_tensor(buffer)
        trained = {name: p for name, p in made.model.named_parameters() if p.requires_grad}
        optimizer = MasterAdamW(trained, given)
        result = train_step(made.model, batch, optimizer, lr=1e-3, max_grad_norm=1.0, plain_head=made.plain_head)
    assert isinstance(batch.micro_batches[0].layout, Layout)
    assert isinstance(result.loss, FakeTensor)
    assert result.loss.shape == result.grad_norm.shape == ()
    moments = {p: state["exp_avg"] for p, state in optimizer._adamw.state.items()}
    assert set(moments) == set(trained.values())  # each had a gradient
    assert all(isinstance(m, FakeTensor) and m.shape == p.shape for p, m in moments.items())


def test_blocks_are_those_that_the_probe_admits(models):
    """What large fake models get without a proof is what a small real one gets with it."""
    config = models.shape("tiny")
    proved, made = (models.base(config, "qlora", CPU) for _ in range(2))
    swap.replace_blocks(proved)
    models.replace_unproved(made)
    kinds = [{name: type(m) for name, m in model.named_modules()} for model in (proved, made)]
    assert kinds[0] == kinds[1]
    details = [
        [(m.scale, m.window, m.size, m.layer) for m in model.modules() if isinstance(m, swap.Attention)]
        for model in (proved, made)
    ]
    assert details[0] == details[1] != []


@pytest.mark.parametrize("keeping", ["recomputed", "offloaded", "kept"])
def test_a_65b_qlora_step(models, monkeypatch, keeping):
    """Its real width, as on a GPU: attention through torch's flash kernels, all other ops by their fakes.

    Recomputed, as it would be trained, in its real depth.
    """
    config, mode = models.shape("65B"), FakeTensorMode()
    config.num_hidden_layers = 80 if keeping == "recomputed" else 3
    made = models.ours(config, "qlora", CPU, mode)
    made.recompute(keeping == "recomputed")
    cuda._bounds.cache_clear()
    monkeypatch.setattr(cuda, "_rotate", lambda x, cos, sin, back=False: torch.empty_like(x))
    used = Used()
    hooks = HostActivations(made.model) if keeping == "offloaded" else contextlib.nullcontext()
    with mode, used, hooks:
        loss = made.step(models.batch(config, 1, 512, CPU))
    cuda._bounds.cache_clear()
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    layers, forward = config.num_hidden_layers, 2 if keeping == "recomputed" else 1
    assert used.counts["attention"] == forward * layers
    assert used.counts["attention_backward"] == layers
    assert used.inside["_flash_attention_forward"] == forward * layers
    assert used.inside["_flash_attention_backward"] == layers
    assert used.counts["rms_norm"] >= 2 * layers + 1
    assert used.counts["swiglu_backward"] == layers
    assert used.counts["nf4_linear_transposed"] >= 6 * layers
    assert used.counts["cross_entropy_"] >= 1
    stored = sum(p.nbytes for p in made.model.parameters())
    if keeping == "recomputed":
        assert 34e9 < stored < 36e9  # 65e9 weights of 4.127 bits, 16-bit embeddings and head, the adapter in float32
