"""The benchmark of the operations tells their errors and memory rightly, and all of it as JSON."""

import dataclasses
import json
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import cases
import gpu
import losses

CPU = torch.device("cpu")
OPERATIONS = (
    cases.VOCABULARY_LOSS,
    cases.ATTENTION_MAP_LOSS,
    cases.ATTENTION_MAP_MSE,
    cases.HIDDEN_STATE_LOSS,
    cases.HIDDEN_STATE_MSE,
    cases.ATTENTION,
    cases.ATTENTION_WITH_DROPOUT,
    cases.DROPOUT,
    cases.ATTENTION_AND_MAP_LOSS,
    cases.FEED_FORWARD,
    cases.ADD_AND_NORM,
)


def toy_case(operation: cases.Operation, dtype: torch.dtype = torch.float32) -> cases.Case:
    is_vocabulary = operation is cases.VOCABULARY_LOSS
    return cases.Case(operation, {"M": 5, "V": 97} if is_vocabulary else {"B": 2, "S": 7}, dtype)


@pytest.fixture
def times_and_errors_alone(monkeypatch):
    monkeypatch.setattr(losses, "peak_of_call", lambda *_: 0)
    monkeypatch.setattr(losses, "MOST_REPEATS", 4)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_each_operation_errs_as_its_precision_does(times_and_errors_alone, operation, dtype):
    rows = losses.measure(toy_case(operation, dtype), CPU)
    assert [row["variant"] for row in rows] == ["plain", "fused"]
    for row in rows:
        assert 0 < row["seconds"] < 1
        if operation.is_random:
            assert "value_error" not in row
        elif dtype == torch.float32:
            assert row["value_error"] < 1e-5 and 1e-9 < row["gradient_error"] < 1e-5
        else:
            assert row["value_error"] < 1e-2 and 1e-4 < row["gradient_error"] < 1e-2


def test_a_wrong_operation_is_seen(times_and_errors_alone):
    def too_large(*arguments):
        return 1.25 * cases.HIDDEN_STATE_LOSS.plain(*arguments)

    wrong = dataclasses.replace(cases.HIDDEN_STATE_LOSS, fused=too_large)
    _, row = losses.measure(toy_case(wrong), CPU)
    assert row["value_error"] == pytest.approx(0.25, rel=1e-4)
    assert row["gradient_error"] == pytest.approx(0.25, rel=1e-4)


def test_the_error_of_several_tensors_is_that_of_all_their_numbers():
    truth = [torch.tensor([3.0, 0.0]).double(), torch.tensor([[4.0]]).double()]
    found = [torch.tensor([3.0, 0.3]), torch.tensor([[4.4]])]
    assert losses.relative_error(found, truth) == pytest.approx(0.1, rel=1e-6)
    assert losses.relative_error([torch.tensor([0.3])], [torch.zeros(1).double()]) < 0.301


def test_where_plain_is_too_large_fused_stands_alone(times_and_errors_alone, monkeypatch):
    case = toy_case(cases.ATTENTION_MAP_LOSS)
    assert case.plain_bytes() == 5 * 8 * 2 * cases.N * 7 * 7
    monkeypatch.setitem(losses.LARGEST_PLAIN, "cpu", case.plain_bytes() - 1)
    (row,) = losses.measure(case, CPU)
    assert row["variant"] == "fused" and row["seconds"] > 0 and "value_error" not in row


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, when it compiles
def test_on_a_gpu_fused_stands_there_with_its_kernels_and_without(monkeypatch):
    monkeypatch.setattr(losses, "installed", lambda package: True)
    cuda = torch.device("cuda")
    variants = losses.variants_of(toy_case(cases.VOCABULARY_LOSS), cuda)
    assert [variant.name for variant in variants] == ["plain", "plain compiled", "fused", "kernels"]
    assert [variant.kernels for variant in variants] == [True, True, False, True]
    variants = losses.variants_of(toy_case(cases.HIDDEN_STATE_LOSS), cuda)
    assert [variant.name for variant in variants] == ["plain", "plain compiled", "fused", "kernels"]
    for dtype, last in ((torch.float32, "fused"), (torch.bfloat16, "kernels")):
        variants = losses.variants_of(toy_case(cases.ATTENTION, dtype), cuda)
        assert variants[-1].name == last
    variants = losses.variants_of(toy_case(cases.DROPOUT), cuda)
    assert [variant.name for variant in variants] == ["plain", "fused"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kernels", [True, False])
def test_a_call_has_its_own_choice_of_kernels_and_leaves_none(monkeypatch, before, kernels):
    monkeypatch.setattr(losses.tiles, "KERNELS", before)
    seen = []

    def looks(values, probability):
        values.register_hook(lambda gradient: seen.append(losses.tiles.KERNELS))
        seen.append(losses.tiles.KERNELS)
        return 2 * values

    call = toy_case(cases.DROPOUT).call(CPU)
    losses.call_once(losses.Variant("looks", looks, kernels=kernels), call)
    assert seen == [kernels, kernels]  # in forward and in backward
    assert before == losses.tiles.KERNELS
    with pytest.raises(ZeroDivisionError):
        losses.call_once(losses.Variant("fails", lambda *_: 1 / 0, kernels=kernels), call)
    assert before == losses.tiles.KERNELS


def test_a_variant_that_fails_does_not_take_the_others_along(times_and_errors_alone):
    def fails(*_):
        raise torch.OutOfMemoryError("too little\nmemory")

    broken = dataclasses.replace(cases.DROPOUT, fused=fails)
    plain, fused = losses.measure(toy_case(broken), CPU)
    assert plain["seconds"] > 0
    assert fused["failure"] == "OutOfMemoryError: too little"
    assert losses.told(fused).endswith("too little")


def test_a_variant_that_fails_late_does_not_take_the_others_along(times_and_errors_alone):
    calls = []

    def fails_at_last(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("late")
        return cases.DROPOUT.plain(*arguments)

    broken = dataclasses.replace(cases.DROPOUT, fused=fails_at_last)
    plain, fused = losses.measure(toy_case(broken), CPU)
    assert plain["seconds"] > 0
    assert fused["failure"] == "RuntimeError: late" and "seconds" not in fused


def test_triton_may_raise_what_it_likes():
    class CompilationError(Exception):
        pass

    row = {}
    with losses.told_in(row, torch.device("cuda")):
        raise CompilationError("at 3:5:\nno such operation")
    assert row == {"failure": "CompilationError: at 3:5:"}
    with pytest.raises(CompilationError), losses.told_in(row, CPU):  # where there is no Triton
        raise CompilationError


def peak_of_allocating(*sizes: int) -> int:
    """One after the other, each let go before the next."""

    def allocate():
        for size in sizes:
            torch.ones(size, dtype=torch.uint8)

    return losses.added_to_peak(allocate)


def test_memory_is_that_of_the_largest_moment():
    held = torch.ones(300_000_000, dtype=torch.uint8)  # by this process: none of theirs
    measured = losses.in_own_process(peak_of_allocating, 40_000_000, 100_000_000, 60_000_000)
    assert measured == pytest.approx(1e8, rel=0.2)
    del held


def test_memory_of_a_call_holds_its_gradients():
    """Plain maps: q's and k's gradients, and some maps of (N, S, S) in float32, 3.1 MB each."""
    case = cases.Case(cases.ATTENTION_MAP_LOSS, {"B": 1, "S": 256}, torch.float32)
    plain, _ = losses.variants_of(case, CPU)
    maps = cases.N * 256 * 256 * 4
    assert 4 * maps < losses.peak_of_call(case, plain, CPU) < 14 * maps


def run(monkeypatch, module, *flags: str) -> int:
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *flags])
    return losses.run_command(module.main)


@pytest.fixture
def two_cases(monkeypatch, times_and_errors_alone):
    toys = [toy_case(cases.VOCABULARY_LOSS), toy_case(cases.DROPOUT, torch.bfloat16)]
    monkeypatch.setattr(losses, "quick_cases", lambda: toys)


def test_the_last_line_is_json(two_cases, monkeypatch, capsys):
    assert run(monkeypatch, losses, "--quick", "--device", "cpu") == 0
    *table, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert report["benchmark"] == "losses" and report["versions"]["torch"] == torch.__version__
    assert len(table) == 1 + len(report["rows"]) == 5
    first = report["rows"][0]
    assert first["operation"] == "vocabulary_loss" and (first["M"], first["V"]) == (5, 97)
    assert report["rows"][3]["dtype"] == "bfloat16"


def test_without_matplotlib_a_plot_is_refused(two_cases, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(losses, "installed", lambda package: package != "matplotlib")
    assert run(monkeypatch, losses, "--quick", "--plot", str(tmp_path / "plot.png")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and 'pip install -e ".[report]"' in error


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="the plot is drawn by matplotlib")
def test_the_plot_is_a_picture(tmp_path):
    rows = [
        {"operation": name, fixed: size, letter: 2**power, "dtype": dtype, "variant": variant}
        | {"peak_mb": 3.0 * power, "seconds": 0.1 * power}
        for name, fixed, size, letter in (
            ("attention_map_loss", "B", 1, "S"),
            ("vocabulary_loss", "M", 256, "V"),
        )
        for dtype in ("float32", "bfloat16")
        for variant in ("plain", "fused")
        for power in (6, 8, 10)
    ]
    losses.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_without_a_gpu_its_benchmark_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch, gpu, "--out", str(tmp_path / "gpu.json")) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "CUDA" in told.err and told.out == ""
    assert not list(tmp_path.iterdir())


def test_what_there_is_no_time_for_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "LOSSES_END", -1)
    report = gpu.Report(tmp_path / "gpu.json", {"benchmark": "gpu"}, 60.0)
    gpu.measure_losses(report, 192, CPU)
    report.add()
    known = json.loads((tmp_path / "gpu.json").read_text())
    assert "vocabulary_loss {'M': 6144, 'V': 28996} torch.float32" in known["skipped"]
    assert known["benchmark"] == "gpu" and known["seconds"] > 0
