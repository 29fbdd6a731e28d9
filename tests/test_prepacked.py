"""Weights laid out beforehand give the products that the weights themselves give, and are the
teacher's in the steps of a bfloat16 run alone.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY_CONFIG
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import train
from minibert.data.corpus import Corpus
from minibert.model import BertForMaskedLM, Linear
from minibert.ops import fused, plain, prepacked
from minibert.ops.prepacked import FUNCTIONS, can_prepack, prepack

HERE = can_prepack(torch.zeros(1, 1, dtype=torch.bfloat16))  # on this CPU, by this torch
EPS = torch.finfo(torch.bfloat16).eps


def linear_of(num_in: int, num_out: int) -> Linear:
    """With weights and biases of some size, in bfloat16."""
    torch.manual_seed(num_in + 100 * num_out)
    linear = Linear(num_in, num_out)
    nn.init.normal_(linear.weight, std=num_in**-0.5)
    nn.init.normal_(linear.bias)
    return linear.to(torch.bfloat16).requires_grad_(False)


@given(st.integers(1, 70), st.integers(1, 70), st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_products_are_as_exact_as_without(num_in, num_out, shape):
    linear = linear_of(num_in, num_out)
    weight = linear.weight.clone()
    values = 3 * torch.randn(*shape, num_in).to(torch.bfloat16)
    prepack(linear)
    assert linear.weight.is_mkldnn == HERE and linear.weight.shape == weight.shape
    for gelu in (False, True):
        truth = F.linear(values.double(), weight.double(), linear.bias.double())
        by_plain = (plain.linear_gelu if gelu else plain.linear)(values, weight, linear.bias)
        truth = F.gelu(truth) if gelu else truth
        found = linear(values, fused, gelu=gelu)
        assert found.dtype == torch.bfloat16 and found.shape == truth.shape
        errors = [(each.double() - truth).norm() for each in (by_plain, found)]
        assert errors[1] <= errors[0] + EPS / 2 * truth.norm()


def test_gelu_is_that_of_the_error_function():
    """At -3 its approximation by tanh is a tenth off: -0.00364."""
    linear = nn.Linear(1, 1).to(torch.bfloat16).requires_grad_(False)
    linear.weight.fill_(1), linear.bias.fill_(0)
    prepack(linear)
    value = torch.tensor([[-3.0]], dtype=torch.bfloat16)
    found = fused.linear_gelu(value, linear.weight, linear.bias)
    assert found.item() == pytest.approx(-0.00405, rel=0.005)


def test_a_model_computes_the_same():
    """As near to float64 as with its weights as they are, to a rounding of bfloat16."""
    torch.manual_seed(7)
    model = BertForMaskedLM(TOY_CONFIG).requires_grad_(False).eval()
    rounded = BertForMaskedLM(TOY_CONFIG).requires_grad_(False).eval()
    rounded.load_state_dict(model.state_dict())
    rounded.to(torch.bfloat16)
    exact = BertForMaskedLM(TOY_CONFIG).requires_grad_(False).eval().double()
    exact.load_state_dict(rounded.state_dict())
    ids = torch.randint(5, TOY_CONFIG.vocab_size, (3, 11))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        truth = exact(**given).head_output
        as_it_is = rounded(**given, ops=fused).head_output
        prepack(rounded)
        found = rounded(**given, ops=fused).head_output
    errors = [(each.double() - truth).norm() / truth.norm() for each in (as_it_is, found)]
    assert errors[1] <= 1.5 * errors[0] and errors[0] > 0
    assert all(
        module.weight.is_mkldnn == HERE
        for module in rounded.modules()
        if isinstance(module, nn.Linear)
    )


@pytest.mark.parametrize("lacking", ["function", "AVX-512", "bfloat16"])
def test_elsewhere_weights_stay_as_they_are(monkeypatch, lacking):
    dtype = torch.bfloat16
    if lacking == "function":
        monkeypatch.setattr(prepacked, "FUNCTIONS", (*FUNCTIONS, "_not_in_this_torch"))
    elif lacking == "AVX-512":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    else:
        dtype = torch.float32
    linear = linear_of(7, 5).to(dtype)
    before = linear.weight
    prepack(linear)
    assert linear.weight is before and not before.is_mkldnn


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of what torch.compile imports
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, HERE),
        ({"dtype": "float32"}, False),
        ({"ops": "plain"}, False),
        ({"compile": True}, False),
    ],
)
def test_they_are_those_of_the_steps_teacher(toy_run, settings, expected):
    run = dataclasses.replace(toy_run, **{"dtype": "bfloat16", **settings})
    corpus = Corpus.open(run.data)
    student, teacher, run = train.build_models(run, corpus, torch.device("cpu"))
    learner, guide = train.forward_passes(student, teacher, run)
    assert guide.layers[0].query.weight.is_mkldnn == expected
    for model in (learner, student, teacher):  # the teacher that evaluations take
        assert not any(parameter.is_mkldnn for parameter in model.parameters())
