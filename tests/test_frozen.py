"""Linear maps of a frozen model give what others give, and are the teacher's in a run's steps."""

import dataclasses
import os
from pathlib import Path

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
    """Whether this CPU has such products, by what the system tells of it."""
    about_it = Path("/proc/cpuinfo")
    flags = set(about_it.read_text().split()) if about_it.exists() else set()
    if not {"avx512bw", "avx512dq", "avx512vl"} <= flags or "ATEN_CPU_CAPABILITY" in os.environ:
        return False
    return dtype == torch.bfloat16 or torch.get_float32_matmul_precision() == "medium"


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
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_results_are_summed_up_and_rounded_once(dtype, num_in, num_out, shape):
    """Each is off by half a unit of its own, and by what float32 sums round away."""
    linear = linear_of(num_in, num_out, dtype)
    weight, bias = linear.weight.clone(), linear.bias
    values = 3 * torch.randn(*shape, num_in).to(dtype)
    freeze(linear)
    assert isinstance(linear.weight, FrozenWeight) == here(dtype)
    assert linear.weight.shape == weight.shape and linear.weight.dtype == dtype
    exact = [part.double() for part in (values, weight, bias)]
    truth = F.linear(*exact)
    found = fused.linear(values, linear.weight, bias)
    assert found.dtype == dtype and found.shape == truth.shape
    sizes = F.linear(*(part.abs() for part in exact))  # of all that is summed up
    half_a_unit = torch.finfo(dtype).eps / 2
    of_sums = (num_in + 2) * torch.finfo(torch.float32).eps * sizes
    assert (abs(found - truth) <= half_a_unit * truth.abs() + of_sums).all()
    if here(dtype):
        truth = F.gelu(truth)
        found = frozen_linear(values, linear.weight, bias, gelu=True)
        assert (abs(found - truth) <= half_a_unit * truth.abs() + 2 * of_sums).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_is_that_of_the_error_function(dtype):
    """Its approximation by tanh is off by up to 0.0005, at -3 by a tenth."""
    inner, outer = (linear_of(1, 1, dtype) for _ in range(2))
    for linear in (inner, outer):
        linear.weight.fill_(1)
        linear.bias.fill_(0)
        freeze(linear)
    pairs = ((linear.weight, linear.bias) for linear in (inner, outer))
    values = torch.linspace(-6, 6, 121).to(dtype)[:, None]
    found, truth = fused.feed_forward(values, *pairs), F.gelu(values.double())
    assert (abs(found - truth) <= torch.finfo(dtype).eps / 2 * truth.abs() + 1e-6).all()


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


@pytest.mark.parametrize(
    "lacking", ["function", "AVX-512", "bfloat16", "exact products", "the same products"]
)
def test_elsewhere_weights_stay_as_they_are(monkeypatch, lacking):
    dtype = torch.bfloat16 if lacking == "bfloat16" else torch.float32
    linear = linear_of(7, 5, dtype)
    before = linear.weight
    assert can_freeze(before) == here(dtype)
    if lacking == "function":
        monkeypatch.setattr(frozen, "FUNCTIONS", (*FUNCTIONS, "_not_in_this_torch"))
    elif lacking == "AVX-512":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    elif lacking == "bfloat16":
        name = "_is_mkldnn_bf16_supported"
        monkeypatch.setattr(torch.ops.mkldnn, name, lambda: False, raising=False)
    elif lacking == "exact products":  # as of a CPU that rounds factors to bfloat16
        monkeypatch.setattr(frozen, "frozen_linear", lambda values, *_: torch.ones_like(values))
    else:  # float32 is another library's
        torch.set_float32_matmul_precision("highest")
    freeze(linear)
    assert linear.weight is before


@pytest.mark.parametrize("dtype", DTYPES)
def test_twice_is_as_good_as_once(dtype):
    linear = linear_of(7, 5, dtype)
    values = torch.randn(3, 7).to(dtype)
    freeze(linear)
    once = fused.linear(values, linear.weight, linear.bias)
    freeze(linear)
    assert torch.equal(fused.linear(values, linear.weight, linear.bias), once)


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
