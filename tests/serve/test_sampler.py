import torch

from twinlora.serve.sampler import choose, generator
from twinlora.serve.state import Sampling

CPU = torch.device("cpu")


def test_rows_follow_their_own_rules():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0], [0.0, 0.0, 5.0]])
    rules = [Sampling(1), Sampling(1, temperature=1.0, seed=3), Sampling(1, top_logprobs=2)]
    first, _, last = choose(logits, rules, [generator(rule, CPU) for rule in rules])
    assert (first.token, first.logprob, last.token) == (1, None, 2)
    assert last.top[0] == (2, last.logprob)
    assert abs(last.logprob - torch.log_softmax(logits[2], 0)[2].item()) < 1e-6


def test_rows_that_are_not_finite_are_told_apart():
    logits = torch.tensor([[0.0, float("nan")], [0.0, 1.0], [float("inf"), 1.0]])
    rules = [Sampling(1, temperature=1.0), Sampling(1), Sampling(1)]
    found = choose(logits, rules, [generator(rule, CPU) for rule in rules])
    assert [token and token.token for token in found] == [None, 1, None]


def test_next_to_no_temperature_or_share_leaves_the_likeliest_token():
    logits = torch.tensor([[0.0, 3.0, 1.0]] * 3)
    rules = [Sampling(1, 1e-40), Sampling(1, 1.0, 1e-50, seed=0), Sampling(1, 1e-4, 1e-30, seed=0)]
    found = choose(logits, rules, [generator(rule, CPU) for rule in rules])
    assert [token.token for token in found] == [1, 1, 1]


def test_draws_have_the_models_probabilities_within_top_p():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    rule = Sampling(1, temperature=1.0, top_p=0.75, seed=0)
    source, counts = generator(rule, CPU), torch.zeros(4)
    for _ in range(2000):
        counts[choose(logits, [rule], [source])[0].token] += 1
    assert counts[2:].sum() == 0
    assert abs(counts[0] / 2000 - 0.625) < 0.04
