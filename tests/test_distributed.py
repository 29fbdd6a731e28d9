"""Any number of ranks takes the updates of one process: the same losses, gradients and weights."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, command_line, on_ranks
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import train as train_script
from minibert.data.batches import Batches
from minibert.data.corpus import Corpus
from minibert.data.merge import write_corpus
from minibert.data.tokenizer import load_tokenizer
from minibert.evaluate import evaluate
from minibert.run_config import RunConfig
from minibert.training.checkpoint import checkpoints
from minibert.training.distributed import rank, summed, world_size
from minibert.training.optimizer import build_optimizer
from minibert.training.runlog import TIMES, read_metrics

WHOLE, CUT = 10_000, 45  # tokens of a micro-batch: all at once, or two or three sequences


@pytest.fixture(scope="module")
def still_teacher(toy_world, tmp_path_factory) -> Path:
    """The toy teacher without dropout: what is learnt depends on the mathematics alone."""
    folder = tmp_path_factory.mktemp("still") / "teacher"
    shutil.copytree(toy_world / "teacher", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def still_run(toy_world, still_teacher, tmp_path_factory) -> RunConfig:
    """A run of 30 updates of 7 sequences."""
    return RunConfig(
        teacher=still_teacher,
        data=toy_world / "corpus",
        out=tmp_path_factory.mktemp("still") / "run",
        steps=30,
        batch_size=7,
        micro_batch_tokens=CUT,
        max_length=19,
        learning_rate=1e-2,
        warmup_steps=2,
        log_every=1,
        eval_every=10,
        device="cpu",
    ).resolved()


# --- One update -----------------------------------------------------------------------------------


def one_update(run: RunConfig, step: int) -> dict[str, Any]:
    """What update `step` of a run makes of the first weights, on this rank."""
    corpus, record = Corpus.open(run.data), {}
    student, teacher, run = train_script.build_models(run, corpus, torch.device("cpu"))
    sizes = (run.max_length, run.micro_batch_tokens, run.batch_size)
    batch = Batches(corpus, *sizes, run.seed, rank(), world_size()).at(step)
    optimizer = build_optimizer(student, run.weight_decay)
    learner, guide = train_script.forward_passes(student, teacher, run)
    record["cut into"] = len(batch.micro_batches)
    record["masked here"] = sum(len(micro_batch.labels) for micro_batch in batch.micro_batches)
    with recorded(record, learner):
        figures = train_script.update(learner, guide, optimizer, batch, step, run)
    record["figures"] = figures.tolist()
    record["weights"] = {name: p.detach() for name, p in student.named_parameters()}
    mine = {id(parameter) for parameter in student.parameters()}
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    record["the student alone"] = optimised == mine == {id(p) for p in learner.parameters()}
    record["teacher apart"] = teacher is None or not (
        isinstance(guide, DistributedDataParallel) or mine & {id(p) for p in teacher.parameters()}
    )
    return record


@contextmanager
def recorded(record: dict[str, Any], learner: torch.nn.Module) -> Iterator[None]:
    """Note the gradient before it is clipped, and after which micro-batches it was exchanged."""
    clip, terms = train_script.clip_grad_norm_, train_script.loss_terms
    record["micro-batches"], record["exchanges"] = 0, []

    def noting_clip(parameters, largest):
        record["gradient"] = {name: p.grad.clone() for name, p in named(learner)}
        return clip(parameters, largest)

    def counting_terms(*arguments):
        record["micro-batches"] += 1
        return terms(*arguments)

    def counting_hook(state, bucket):
        record["exchanges"].append(record["micro-batches"])
        return allreduce_hook(state, bucket)

    if dist.is_initialized():
        learner.register_comm_hook(None, counting_hook)
    train_script.clip_grad_norm_, train_script.loss_terms = noting_clip, counting_terms
    yield
    train_script.clip_grad_norm_, train_script.loss_terms = clip, terms


def named(learner: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return getattr(learner, "module", learner).named_parameters()


def updates_of(runs: list[tuple[RunConfig, int]]) -> list[dict[str, Any]]:
    return [one_update(run, step) for run, step in runs]


def nothing_masked_on_rank_1(run: RunConfig) -> int:
    """A step of batches of two whose shorter sequence has nothing to fill in."""
    batches = Batches(Corpus.open(run.data), run.max_length, WHOLE, 2, run.seed, 1, 2)
    return next(
        step
        for step in range(1000)
        if len((batch := batches.at(step)).micro_batches[0].labels) == 0 < batch.num_masked
    )


WEIGHTS = ("mlm_weight", "hidden_weight", "attention_weight", "output_weight")


def some_weights_alone(run: RunConfig) -> dict[str, RunConfig]:
    """The run with every choice of weights that are 0."""
    choices = {}
    for choice in range(1, 2 ** len(WEIGHTS)):
        kept = [name for bit, name in enumerate(WEIGHTS) if choice & 1 << bit]
        zeros = {name: 0.0 for name in WEIGHTS if name not in kept}
        choices[" ".join(kept)] = dataclasses.replace(run, **zeros)
    return choices


@pytest.fixture(scope="module")
def cases(still_run) -> dict[str, tuple[RunConfig, int]]:
    """Runs, and which of their updates is taken."""
    replace = dataclasses.replace
    mlm = {"recipe": "mlm", "teacher": None, "model": still_run.teacher}
    mlm |= {name: None for name in (*WEIGHTS, "teacher_layers", "temperature")}
    cases = {
        "nine sequences": (replace(still_run, batch_size=9), 0),
        "plain": (replace(still_run, ops="plain"), 1),
        "bfloat16": (replace(still_run, dtype="bfloat16"), 2),
        "mlm": (replace(still_run, **mlm).resolved(), 3),
        "nothing masked": (replace(still_run, batch_size=2), nothing_masked_on_rank_1(still_run)),
    }
    return cases


Measured = dict[tuple[int, int], dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def measured(cases, tmp_path_factory) -> Measured:
    """What ranks make of each case, together and alone."""
    how = ((1, WHOLE), (1, CUT), (2, CUT), (3, CUT), (4, WHOLE))
    return measure(cases, how, tmp_path_factory.mktemp("updates"))


def measure(
    cases: dict[str, tuple[RunConfig, int]], how: Sequence[tuple[int, int]], folder: Path
) -> Measured:
    """(ranks, tokens of a micro-batch) -> case -> what each rank records of the update."""
    found = {}
    for ranks, tokens in how:
        able = {name: case for name, case in cases.items() if case[0].batch_size >= ranks}
        runs = [
            (dataclasses.replace(run, micro_batch_tokens=tokens), step)
            for run, step in able.values()
        ]
        records = on_ranks(ranks, updates_of, runs, folder=folder / f"{ranks}_{tokens}")
        found[ranks, tokens] = dict(zip(able, zip(*records, strict=True), strict=True))
    return found


def test_ranks_and_micro_batches_are_as_meant(measured):
    """Unequal shares, unequal numbers of micro-batches, and one share with nothing masked."""
    cut_into = {
        how: [record["cut into"] for record in cases["nine sequences"]]
        for how, cases in measured.items()
    }
    assert cut_into[1, WHOLE] == [1]
    assert cut_into[1, CUT] == [4]
    assert len(set(cut_into[2, CUT])) == 2
    assert cut_into[4, WHOLE] == [1, 1, 1, 1]
    shares = [record["masked here"] for record in measured[2, CUT]["nothing masked"]]
    assert shares[0] > 0 == shares[1]


def test_the_figures_do_not_depend_on_ranks(measured):
    """Loss, all four terms, each layer's own, and the norm of the gradient before clipping."""
    for how, by_case in measured.items():
        for case, records in by_case.items():
            tolerance = 0.01 if case == "bfloat16" else 2e-5
            expected = measured[1, WHOLE][case][0]["figures"]
            for record in records:
                assert record["figures"] == pytest.approx(expected, rel=tolerance), (how, case)


def test_the_gradient_does_not_depend_on_ranks(measured):
    assert_same_gradients(measured)


def assert_same_gradients(measured: Measured) -> None:
    """As one process has them, before clipping."""
    for how, by_case in measured.items():
        for case, records in by_case.items():
            tolerance = 0.03 if case == "bfloat16" else 3e-6  # found: 0.01, 4e-7
            expected = measured[1, WHOLE][case][0]["gradient"]
            largest = max(tensor.abs().max() for tensor in expected.values())
            for name, tensor in records[0]["gradient"].items():
                error = (tensor - expected[name]).abs().max()
                assert error <= tolerance * largest, (how, case, name)


@pytest.mark.slow
def test_any_loss_weight_may_be_0(still_run, tmp_path):
    """Also where some parameters are not learnt: each still has a gradient to exchange."""
    cases = {name: (run, 4) for name, run in some_weights_alone(still_run).items()}
    measured = measure(cases, [(1, WHOLE), (2, CUT)], tmp_path)
    assert len(measured[2, CUT]) == 15
    assert_same_gradients(measured)


def test_the_weights_do_not_depend_on_ranks(measured):
    """Where there is a gradient: AdamW's first step is its sign, also that of a rounding error."""
    for how, by_case in measured.items():
        for case, records in by_case.items():
            if case == "bfloat16":
                continue
            expected = measured[1, WHOLE][case][0]
            largest = max(tensor.abs().max() for tensor in expected["gradient"].values())
            for name, tensor in records[0]["weights"].items():
                there = expected["gradient"][name].abs() > 1e-5 * largest
                error = (tensor - expected["weights"][name])[there].abs()
                assert (error < 1e-5).all(), (how, case, name)


def test_all_ranks_have_one_gradient_and_one_set_of_weights(measured):
    """To the last bit: or they would drift apart."""
    for how, by_case in measured.items():
        for case, (first, *others) in by_case.items():
            for other in others:
                assert other["figures"] == first["figures"], (how, case)
                for kind in ("gradient", "weights"):
                    for name, tensor in first[kind].items():
                        assert torch.equal(tensor, other[kind][name]), (how, case, kind, name)


def test_gradients_are_exchanged_once_an_update(measured):
    """At the last micro-batch, and at that alone."""
    for (ranks, _), by_case in measured.items():
        for case, records in by_case.items():
            for record in records:
                expected = [record["cut into"]] if ranks > 1 else []
                assert record["exchanges"] == expected, (ranks, case)


def test_the_teacher_stays_apart(measured):
    for by_case in measured.values():
        for records in by_case.values():
            for record in records:
                assert record["the student alone"] and record["teacher apart"]


# --- Whole runs -----------------------------------------------------------------------------------


def curve(run: RunConfig) -> list[list[float]]:
    """The figures of every update of a run, as its log has them."""
    return [figures(line) for line in read_metrics(run.out / "metrics.jsonl") if "loss" in line]


def evaluations(run: RunConfig) -> list[list[float]]:
    lines = read_metrics(run.out / "metrics.jsonl")
    return [figures(line) for line in lines if "held_out_mlm_loss" in line]


def figures(line: dict[str, Any]) -> list[float]:
    """All but how fast it went."""
    values = [value for name, value in line.items() if name not in TIMES]
    return [x for value in values for x in (value if isinstance(value, list) else [value])]


def trained_on(ranks: int, run: RunConfig, name: str) -> RunConfig:
    """The run, when so many ranks have done it into a folder of that name beside --out."""
    run = dataclasses.replace(run, out=run.out.with_name(name))
    on_ranks(ranks, train_script.train, run, folder=run.out.with_name(f"{name} told"))
    return run


def state_bytes(run: RunConfig) -> list[bytes]:
    """The newest checkpoint: weights, moments, step."""
    return [path.read_bytes() for path in sorted(checkpoints(run.out)[-1].iterdir())]


@pytest.fixture(scope="module")
def alone(still_run) -> RunConfig:
    """The run as one process does it."""
    return trained_on(1, still_run, "alone")


# Sums are rounded in another order; found after 30 updates: 1e-6 at most.
CURVE = 2e-5


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_curve_does_not_depend_on_ranks(still_run, alone, ranks):
    """Losses, each layer's own, gradient norms, evaluations; shares are unequal."""
    shared = trained_on(ranks, still_run, f"{ranks} ranks")
    assert len(curve(shared)) == 30
    assert len(evaluations(shared)) == 4
    for ours, theirs in zip(curve(shared), curve(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=CURVE)
    for ours, theirs in zip(evaluations(shared), evaluations(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=CURVE)


def shared_evaluation(run: RunConfig, data: Path, documents: int) -> dict[str, float]:
    """The figures of an untrained student, which every rank is told."""
    corpus = Corpus.open(data)
    student, teacher, run = train_script.build_models(run, corpus, torch.device("cpu"))
    held_out = Batches(corpus, run.max_length, CUT).held_out(documents)
    return evaluate(student, held_out[rank() :: world_size()], teacher, summed)


@pytest.mark.slow
def test_an_evaluation_is_shared(toy_world, still_run, tmp_path):
    """Also by more ranks than there are micro-batches, and where there is nothing held out."""
    corpus = Corpus.open(still_run.data)
    documents = [("one", corpus.tokens(0).tolist()), ("two", corpus.tokens(1).tolist())]
    write_corpus(tmp_path / "none", load_tokenizer(toy_world), documents, held_out=0.0)
    assert [len(Batches(corpus, 19, CUT).held_out(n)) for n in (9, 1)] == [5, 1]
    for data, documents in ((still_run.data, 9), (still_run.data, 1), (tmp_path / "none", 9)):
        question = (shared_evaluation, still_run, data, documents)
        (alone,) = on_ranks(1, *question, folder=tmp_path / "alone")
        shared = on_ranks(3, *question, folder=tmp_path / "shared")
        assert shared[0] == shared[1] == shared[2] == pytest.approx(alone, rel=1e-6)
        assert bool(alone) == (data == still_run.data)


def losses_of_one_batch(run: RunConfig) -> list[list[float]]:
    """The figures of two updates, unsummed, where every rank takes the same whole batch."""
    corpus = Corpus.open(run.data)
    student, teacher, run = train_script.build_models(run, corpus, torch.device("cpu"))
    batch = Batches(corpus, run.max_length, WHOLE, run.batch_size).at(0)
    train_script.summed = lambda figures: figures  # in this process, which ends soon
    learner, guide = train_script.forward_passes(student, teacher, run)
    optimizer = build_optimizer(student, 0.0)
    still = dataclasses.replace(run, learning_rate=1e-30)
    return [
        train_script.update(learner, guide, optimizer, batch, step, still).tolist()
        for step in (0, 1)
    ]


@pytest.mark.slow
def test_dropout_differs_between_ranks_and_steps(still_run, toy_world, tmp_path):
    first, second = on_ranks(2, losses_of_one_batch, still_run, folder=tmp_path)
    assert first == second
    noisy = dataclasses.replace(still_run, teacher=toy_world / "teacher")
    first, second = on_ranks(2, losses_of_one_batch, noisy, folder=tmp_path)
    assert len({first[0][1], first[1][1], second[0][1], second[1][1]}) == 4


@pytest.mark.slow
def test_two_ranks_repeat_themselves_and_go_on_bitwise(still_run, toy_world, tmp_path):
    """With dropout: weights, moments and log; also when stopped and resumed on the way."""
    run = dataclasses.replace(
        still_run,
        teacher=toy_world / "teacher",
        out=tmp_path / "run",
        steps=6,
        save_every=2,
        keep=9,
    )
    one, other = trained_on(2, run, "one"), trained_on(2, run, "other")
    assert curve(one) == curve(other)
    assert state_bytes(one) == state_bytes(other)
    for lost in checkpoints(other.out)[1:]:  # as if it had been killed after update 3
        shutil.rmtree(lost)
    trained_on(2, dataclasses.replace(run, resume=True), "other")
    assert curve(one) == curve(other)
    assert evaluations(one) == evaluations(other)
    assert state_bytes(one) == state_bytes(other)


@pytest.mark.parametrize(("before", "after"), [(1, 2), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_the_number_of_ranks_may_change_on_the_way(still_run, alone, tmp_path, before, after):
    run = dataclasses.replace(still_run, out=tmp_path / "run", save_every=9, keep=9)
    begun = trained_on(before, run, "begun")
    for lost in checkpoints(begun.out)[1:]:
        shutil.rmtree(lost)
    trained_on(after, dataclasses.replace(run, resume=True), "begun")
    for ours, theirs in zip(curve(begun), curve(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=CURVE)


def test_rank_0_alone_writes_and_tells(toy_world, tmp_path):
    """The other rank stands in a folder of its own, where --out would be another one."""
    folders = {number: tmp_path / f"rank {number}" for number in (0, 1)}
    for folder in folders.values():
        folder.mkdir()
    flags = ("--teacher", toy_world / "teacher", "--data", toy_world / "corpus", "--out", "run")
    flags += ("--max-length", 19, "--batch-size", 7, "--steps", 3, "--save-every", 2)
    ranks = Ranks(2, command_line, *flags, folder=tmp_path / "told", where=folders)
    ranks.wait()
    assert ranks.statuses == [0, 0]
    assert ranks.complaints == ["", ""]
    assert "written: run/student" in ranks.told[0]
    assert ranks.told[1] == ""
    found = {path.name for path in (folders[0] / "run").iterdir()}
    expected = {"config.json", "metrics.jsonl", "step_000002", "step_000003", "student", "lock"}
    assert found == expected
    assert list(folders[1].iterdir()) == []
