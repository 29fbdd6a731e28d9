"""What the fused losses hold at once: never a whole map, never all logits.

Quick tests look at every tensor that is made, slow ones at the memory of a process.

Shapes: B batch, S sequence, H hidden, N heads, D head size, V vocabulary, M masked positions.
"""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TOY_CONFIG
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from minibert.data.batches import GlobalBatch, MicroBatch
from minibert.model import BertForMaskedLM
from minibert.ops import fused, plain, tiles, vocabulary
from minibert.student import student_from_teacher

MB = 2**20


class Made(TorchDispatchMode):
    """The shapes of all tensors that are made: forward, backward and in inference mode.

    On a CPU backward runs in the thread that asks for it, and so before these eyes.
    """

    def __init__(self):
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
        settings = settings or {}
        with self:  # inference mode hands over whole functions: look into them
            result = operation.decompose(*arguments, **settings)
        if result is NotImplemented:
            result = operation(*arguments, **settings)
        there = {storage for storage, _ in storages_and_shapes((arguments, settings))}
        made = storages_and_shapes(result)
        self.shapes |= {shape for storage, shape in made if storage not in there}  # no views
        return result

    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(map(prod, self.shapes))

    def largest_map(self, S: int) -> int:
        """Elements of the largest tensor (..., S, S)."""
        return max((prod(shape) for shape in self.shapes if shape[-2:] == (S, S)), default=0)

    def largest_logits(self, V: int) -> int:
        """Elements of the largest tensor (..., V)."""
        return max((prod(shape) for shape in self.shapes if shape[-1:] == (V,)), default=0)


def storages_and_shapes(values: Any) -> list[tuple[int, tuple[int, ...]]]:
    """Where the memory of each tensor among the values lies, and the tensor's shape.

    But for weights that oneDNN has laid out: they do not tell where.
    """
    parts = [part for part in tree_leaves(values) if isinstance(part, Tensor)]
    parts = [part for part in parts if not part.is_mkldnn]
    return [(part.untyped_storage().data_ptr(), tuple(part.shape)) for part in parts]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(prod(shape)))


def map_inputs(N: int, S: int, D: int) -> list[Tensor]:
    """Queries and keys of student and teacher, and the mask of one sequence."""
    parts = [normal(1, S, N, D).transpose(1, 2) for _ in range(4)]  # (1, N, S, D)
    return [*(part.requires_grad_() for part in parts[:2]), *parts[2:], torch.ones(1, S)]


def vocabulary_inputs(M: int, V: int, H: int) -> list[Tensor]:
    """Head output, decoder and bias of student and teacher, and labels."""
    parts = [normal(M, H), normal(V, H), normal(V)]
    return [
        *(part.requires_grad_() for part in parts),
        *map(torch.clone, parts),
        torch.arange(M) % V,
    ]


def forward_and_backward(loss: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Both, with an upstream gradient that is not 1."""
    value = loss(*inputs)
    (value[0] if isinstance(value, tuple) else value).mul(0.7).backward()


# Every tensor.


def test_the_eyes_are_open():
    """A map is seen in a forward, in a backward and, within a function, in inference mode."""
    query, key, *_, mask = map_inputs(2, 31, 5)

    def attention():
        return plain.attention(query, key, key, mask, 0.0)

    with Made() as forward:
        context = attention().sum()
    with Made() as backward:
        context.backward()
    with torch.inference_mode(), Made() as inference:
        attention()
    with torch.inference_mode(), Made() as within:  # (1, 2, 31, 31) exists between the products
        torch.einsum("bnid,bnjd,bnjc->bnic", query, key, key)
    for made in (forward, backward, inference, within):
        assert made.largest_map(31) == 2 * 31 * 31


@pytest.mark.parametrize("S", [157, 613])
@pytest.mark.parametrize("loss", ["attention_map_loss", "attention_map_mse"])
def test_losses_of_attention_maps_make_tiles_of_maps(monkeypatch, loss, S):
    monkeypatch.setattr(tiles, "IN_CACHE", 2**11)
    N, D = 3, 5
    with Made() as made:
        forward_and_backward(getattr(fused, loss), map_inputs(N, S, D))
    assert made.largest() <= max(4 * 2**11, 2 * N * S * D) < N * S * S  # the latter: gradients
    with Made() as made:
        forward_and_backward(getattr(plain, loss), map_inputs(N, S, D))
    assert made.largest() == N * S * S


@pytest.mark.parametrize(("M", "V"), [(97, 401), (97, 6007), (811, 401), (5, 9001)])
def test_vocabulary_loss_makes_tiles_of_logits(monkeypatch, M, V):
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 2**13)
    H = 7
    with Made() as made:
        fused_loss = partial(fused.vocabulary_loss, teacher_entropy=True)
        forward_and_backward(fused_loss, vocabulary_inputs(M, V, H))
    assert V <= made.largest_logits(V) <= max(2**13, V)  # one row at least
    assert made.largest() <= max(2**13, V * H)  # the latter: the decoder's gradient
    with Made() as made:
        forward_and_backward(plain.vocabulary_loss, vocabulary_inputs(M, V, H))
    assert made.largest_logits(V) == M * V


LENGTHS = torch.tensor([61, 61, 40])
S, M, V = 61, 45, 331
ROUNDED_S = 64  # on so many tokens attention is computed
NUM_HEADS, TILE = TOY_CONFIG.num_attention_heads, 7 * V


def tensors_of_a_step(run: train.RunConfig) -> Made:
    """All that loss terms and their backward make, for a toy teacher of 4 layers and its student.

    Dropout is on in the student, off in the teacher.
    """
    config = dataclasses.replace(TOY_CONFIG, max_position_embeddings=S, vocab_size=V)
    torch.manual_seed(0)
    teacher = BertForMaskedLM(config).eval().requires_grad_(False)
    student = student_from_teacher(teacher, (1, 3)).train()
    run = dataclasses.replace(run, teacher_layers=(1, 3), max_length=S)
    learner, guide = train.forward_passes(student, teacher, run)
    attention_mask = (torch.arange(S) < LENGTHS[:, None]).long()
    masked_positions, labels = torch.arange(0, 3 * M, 3), torch.arange(M)
    batch = MicroBatch(torch.full((3, S), 9), attention_mask, masked_positions, labels)
    whole = GlobalBatch([batch], [0, 1, 2], int(LENGTHS.sum()), M)
    with Made() as made:
        terms = train.loss_terms(learner, guide, batch, whole, run)
        loss = terms.vocabulary_loss + terms.hidden_loss.sum() + terms.attention_loss.sum()
        loss.backward()
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ops", ["fused", "plain"])
def test_a_step_makes_no_whole_maps_or_logits(toy_run, monkeypatch, ops, dtype):
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", TILE)
    made = tensors_of_a_step(dataclasses.replace(toy_run, ops=ops, dtype=dtype))
    logits = made.largest_logits(V)
    maps = made.largest_map(ROUNDED_S if ops == "fused" else S)
    if ops == "fused":  # attention with dropout goes over one sequence after the other
        assert maps == NUM_HEADS * ROUNDED_S**2
        assert logits == TILE
        assert made.largest() < M * V  # nor is anything as large under another shape
    else:
        assert maps == 3 * NUM_HEADS * S * S
        assert logits == M * V


# Memory of a process.


def resident(kind: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most.

    The latter is what `ru_maxrss` means to be; but that outlives exec, so that a process which
    pytest starts has pytest's.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{kind}:\s+(\d+) kB", status)[1]) * 1024


def tell_peak(loss: str, *sizes: int) -> None:
    """Print the bytes that forward and backward add to what the process holds: run by `peak_of`."""
    torch.set_num_threads(1)
    inputs = vocabulary_inputs if loss == "vocabulary_loss" else map_inputs
    forward_and_backward(getattr(fused, loss), inputs(*(2 for _ in sizes)))  # libraries get ready
    given = inputs(*sizes)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident("VmRSS")
    forward_and_backward(getattr(fused, loss), given)
    print(resident("VmHWM") - before)


def peak_of(loss: str, *sizes: int, settings: str = "") -> int:
    """Bytes that a fused loss of those sizes adds at its peak, in a process of its own."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("asks Linux for the peak of a process")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    # glibc is to give pages of freed tensors back: what is held is what is asked for.
    environment = {"PYTHONPATH": paths, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    done = subprocess.run(
        [sys.executable, "-c", f"import test_memory as t\n{settings}\nt.tell_peak{(loss, *sizes)}"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["attention_map_loss", "attention_map_mse"])
def test_memory_of_losses_of_attention_maps_grows_linearly(loss):
    """12 heads of 64: at S 4,096 one map is 805 MB, a query 12.6 MB."""
    N, D = 12, 64
    peaks = {S: peak_of(loss, N, S, D) for S in (256, 512, 1024, 2048, 4096)}
    for S, peak in peaks.items():
        query = N * S * D * 4
        assert peak < 11 * query + 32 * MB, peaks  # the constant: tiles
    # Twice the length, twice the growth (4 times would be quadratic).
    assert peaks[4096] - peaks[2048] < 2.2 * (peaks[2048] - peaks[1024]), peaks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("M", "logits_at_once"), [(300, 2**25), (4000, 2**20)], ids=["M300", "M4000"]
)
def test_memory_of_vocabulary_loss_does_not_grow_with_the_vocabulary(M, logits_at_once):
    """Beyond the decoder's own gradient (a sum and an addend) and a tile of each model's logits."""
    H = 64
    for V in (4096, 65_536):
        settings = f"t.vocabulary.LOGITS_AT_ONCE = {logits_at_once}"
        peak = peak_of("vocabulary_loss", M, V, H, settings=settings)
        decoder, tile = 4 * V * H, 4 * min(M * V, logits_at_once)
        assert peak < 2 * decoder + 2 * tile + 16 * MB, (V, peak)
