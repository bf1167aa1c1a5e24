"""Adapters that are combined, and whether they belong to one base."""

import pytest
import torch

from tests.conftest import Notes
from twinlora.adapters import files
from twinlora.config import AdapterCombineOptions
from twinlora.export.combine import combine


@pytest.mark.parametrize(("bases", "said"), [(("one", "one"), False), (("one", "two"), True), (("one", ""), False)])
def test_other_bases_are_said_where_no_passport_tells(tmp_path, bases, said):
    directories = [tmp_path / "a", tmp_path / "b"]
    for directory, base in zip(directories, bases, strict=True):
        factors = {"model.layers.0.self_attn.q_proj": (torch.randn(2, 8), torch.randn(6, 2))}
        files.save_factors(directory, factors, ["q_proj"], base, None)
    reporter = Notes()
    combine(AdapterCombineOptions(adapters=directories, output=tmp_path / "out"), reporter)
    notes = [line for line in reporter.lines if "different base models" in line]
    assert bool(notes) == said
    for directory, base in zip(directories, bases, strict=True) if said else ():
        assert f"{directory}: {base}" in notes[0]
