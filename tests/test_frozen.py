"""Linear maps of a frozen model give what others give, and are the teacher's in a run's steps."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import TOY_CONFIG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import train
from minibert.data.corpus import Corpus
from minibert.model import BertForMaskedLM
from minibert.ops import frozen, fused, plain
from minibert.ops.frozen import FUNCTIONS, FrozenWeight, can_freeze, freeze, frozen_linear
from minibert.training.device import set_up_device

DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def products_as_in_a_run():
    before = torch.get_float32_matmul_precision()
    set_up_device("cpu")
    yield
    torch.set_float32_matmul_precision(before)


def here(dtype: torch.dtype) -> bool:
    """Whether this CPU and this torch have such products."""
    return can_freeze(torch.zeros(1, 1, dtype=dtype))


def linear_of(num_in: int, num_out: int, dtype: torch.dtype) -> nn.Linear:
    """With weights and biases of some size."""
    torch.manual_seed(num_in + 100 * num_out)
    linear = nn.Linear(num_in, num_out)
    nn.init.normal_(linear.weight, std=num_in**-0.5)
    nn.init.normal_(linear.bias)
    return linear.to(dtype).requires_grad_(False)


def error(found: Tensor, truth: Tensor) -> float:
    return (found.double() - truth).norm().item()


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(1, 70), st.integers(1, 70), st.lists(st.integers(0, 9), min_size=1, max_size=3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_products_are_as_exact_as_others(dtype, num_in, num_out, shape):
    linear = linear_of(num_in, num_out, dtype)
    weight, bias = linear.weight.clone(), linear.bias
    values = 3 * torch.randn(*shape, num_in).to(dtype)
    freeze(linear)
    assert isinstance(linear.weight, FrozenWeight) == here(dtype)
    assert linear.weight.shape == weight.shape and linear.weight.dtype == dtype
    truth = F.linear(values.double(), weight.double(), bias.double())
    by_plain = plain.linear(values, weight, bias)
    found = fused.linear(values, linear.weight, bias)
    assert found.dtype == dtype and found.shape == truth.shape
    rounding = torch.finfo(dtype).eps * truth.norm()
    assert error(found, truth) <= error(by_plain, truth) + rounding
    if here(dtype):
        truth = F.gelu(truth)
        found = frozen_linear(values, linear.weight, bias, gelu=True)
        assert error(found, truth) <= error(F.gelu(by_plain), truth) + rounding


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_that_of_the_error_function(dtype):
    """At -3 its approximation by tanh is a tenth off: -0.00364."""
    inner, outer = (linear_of(1, 1, dtype) for _ in range(2))
    for linear in (inner, outer):
        linear.weight.fill_(1)
        linear.bias.fill_(0)
        freeze(linear)
    pairs = ((linear.weight, linear.bias) for linear in (inner, outer))
    found = fused.feed_forward(torch.tensor([[-3.0]], dtype=dtype), *pairs)
    assert found.item() == pytest.approx(-0.00405, rel=0.005)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_computes_the_same(dtype):
    """As near to float64 as before, to a rounding; in float32 plain formulas take it as it is."""
    torch.manual_seed(7)
    model = BertForMaskedLM(TOY_CONFIG).requires_grad_(False).eval().to(dtype)
    exact = BertForMaskedLM(TOY_CONFIG).requires_grad_(False).eval().double()
    exact.load_state_dict(model.state_dict())
    ids = torch.randint(5, TOY_CONFIG.vocab_size, (3, 11))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.inference_mode():
        truth = exact(**inputs).head_output
        before, by_plain = (model(**inputs, ops=ops).head_output for ops in (fused, plain))
        freeze(model)
        found = model(**inputs, ops=fused).head_output
        if dtype == torch.float32:
            assert torch.equal(model(**inputs, ops=plain).head_output, by_plain)
    assert 0 < error(before, truth) < 0.02 * truth.norm()
    assert error(found, truth) <= 1.5 * error(before, truth)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert all(isinstance(linear.weight, FrozenWeight) == here(dtype) for linear in linears)


@pytest.mark.parametrize("lacking", ["function", "AVX-512", "exact products", "such weights"])
def test_elsewhere_weights_stay_as_they_are(monkeypatch, lacking):
    dtype = torch.float32
    if lacking == "function":
        monkeypatch.setattr(frozen, "FUNCTIONS", (*FUNCTIONS, "_not_in_this_torch"))
    elif lacking == "AVX-512":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    elif lacking == "exact products":  # float32 is not oneDNN's where that would round it
        torch.set_float32_matmul_precision("highest")
    else:
        dtype = torch.float64
    linear = linear_of(7, 5, dtype)
    before = linear.weight
    freeze(linear)
    assert linear.weight is before


@pytest.mark.filterwarnings("ignore:`torch.jit")  # of what torch.compile imports
@pytest.mark.parametrize(("ops", "compiled"), [("fused", False), ("fused", True), ("plain", False)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_they_are_those_of_the_steps_teacher(toy_run, dtype, ops, compiled):
    run = dataclasses.replace(toy_run, dtype=dtype, ops=ops, compile=compiled)
    corpus = Corpus.open(run.data)
    student, teacher, run = train.build_models(run, corpus, torch.device("cpu"))
    before = [weight.clone() for weight in teacher.parameters()]
    learner, guide = train.forward_passes(student, teacher, run)
    is_frozen = isinstance(guide.layers[0].query.weight, FrozenWeight)
    assert is_frozen == (here(getattr(torch, dtype)) and ops == "fused" and not compiled)
    assert not any(isinstance(weight, FrozenWeight) for weight in learner.parameters())
    for weight, as_it_was in zip(teacher.parameters(), before, strict=True):
        assert torch.equal(weight, as_it_was)  # for evaluations
