"""Shapes against the counts of parameters that their publishers give."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from twinlora.plan.shapes import SHAPES


def count(shape, layers: int) -> int:
    config = shape.config()
    setattr(config, config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), layers)
    if getattr(config, "layer_types", None):
        config.layer_types = (config.layer_types * layers)[:layers]
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(name):
    shape = SHAPES[name]
    one, two = count(shape, 1), count(shape, 2)
    total = one + (shape.config().num_hidden_layers - 1) * (two - one)
    tolerance = 0.005 if name == "gpt3-175b" else 0.0  # its paper rounds to half a billion
    assert total == pytest.approx(shape.parameters, rel=tolerance, abs=0)


def test_every_shape_says_where_it_is_from():
    assert all("arXiv" in shape.source or shape.hub in shape.source for shape in SHAPES.values())
    assert {"gpt3-175b", "llama-65b", "mixtral-8x7b", "gemma3-4b", "phi4", "smollm2-135m"} <= set(SHAPES)
