"""The training step on tensors without data: every op on its way has a fake with the right shapes and types."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.train.test_loop import options
from twinlora.data.packing import make_batch
from twinlora.model.attention import Layout
from twinlora.numerics import ops
from twinlora.reporter import Reporter
from twinlora.train.inputs import read_inputs
from twinlora.train.notes import Notes
from twinlora.train.optim import MasterAdamW
from twinlora.train.prepare import prepare
from twinlora.train.step import train_step


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("rides", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_qlora_step(tiny, data_file, tmp_path, rides, dtype, monkeypatch):
    monkeypatch.setattr(ops, "adds_products", lambda device: rides)
    given = options(tiny, data_file, tmp_path / "r", method="qlora")
    inputs = read_inputs(given, Notes(Reporter()))
    made = prepare(given, inputs, dtype, torch.device("cpu"), Notes(Reporter()))
    batch = make_batch(inputs.examples[:3], 400, packed=True, pad_id=0)
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
