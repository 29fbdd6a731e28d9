"""The learning rate and the parameter groups are those of the published training."""

import pytest
import torch
from conftest import TOY_CONFIG
from hypothesis import given
from hypothesis import strategies as st

from minibert.model import BertForMaskedLM
from minibert.training.optimizer import build_optimizer, learning_rate_at


def test_the_published_schedule():
    """5,000 steps up, then down to 0 at 100,000; as in transformers from the top on."""
    rates = [learning_rate_at(step, 100_000, 5_000, 5e-4) for step in range(100_000)]
    assert rates[0] == pytest.approx(5e-4 / 5_000)  # theirs: 0
    assert max(rates) == rates[4_999] == rates[5_000] == 5e-4
    assert rates[52_500] == pytest.approx(2.5e-4)
    assert rates[99_999] == pytest.approx(5e-4 / 95_000)
    transformers = pytest.importorskip("transformers", reason="the oracle of the schedule")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    theirs = transformers.get_linear_schedule_with_warmup(optimizer, 5_000, 100_000).lr_lambdas[0]
    for step in (5_000, 5_001, 33_333, 99_999):
        assert rates[step] == pytest.approx(5e-4 * theirs(step))


@given(data=st.data())
def test_every_update_learns(data):
    steps = data.draw(st.integers(1, 5000))
    warmup_steps = data.draw(st.integers(0, steps))
    step = data.draw(st.integers(0, steps - 1))
    assert 0 < learning_rate_at(step, steps, warmup_steps, 0.3) <= 0.3


def test_biases_and_layer_norms_do_not_decay():
    model = BertForMaskedLM(TOY_CONFIG)
    decaying, still = build_optimizer(model, weight_decay=0.1).param_groups
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.1, 0.0)
    decays = {id(parameter) for parameter in decaying["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decays) == (
            not name.endswith("bias") and "layer_norm" not in name
        ), name
    assert len(decaying["params"]) + len(still["params"]) == len(list(model.parameters()))
