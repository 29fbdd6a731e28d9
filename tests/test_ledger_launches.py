"""A launch of a Triton kernel is an operation of the ledger, with FLOPs and bytes of its own.

By shapes alone nothing is launched, so that a step as with a GPU is recorded without one; a process
of its own runs the kernels in Triton's interpreter and finds the same.
"""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from ledger_toys import TOY, asked_in, ledger_of, run_of

from minibert.ledger.record import BACKWARD, LOSSES, STUDENT, TEACHER

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if torch.cuda.is_available():
    pytest.skip("here the kernels would want a GPU's tensors", allow_module_level=True)

B, S, N, H, V, M = 5, 13, 3, TOY.hidden_size, TOY.vocab_size, 10
PAIRS = B * S * S
LAYERS, TEACHER_LAYERS, LEVELS, MICRO_BATCHES = 2, 4, 2, 3
PARTS = 7  # programs of the gradient of "add & norm"


@pytest.fixture
def step_with_kernels(monkeypatch):
    """Records a toy step in which the fused losses run as on a GPU with Triton."""
    from minibert.ops import attention, fused, hidden_states, kernels, vocabulary
    from minibert.ops.kernels import norm_rows

    monkeypatch.setattr(attention, "_attention_kernels", lambda tensor: kernels)  # in float32 too
    for module in (attention, fused, hidden_states, vocabulary):
        monkeypatch.setattr(module, "kernels_for", lambda tensor: kernels)
    monkeypatch.setattr(norm_rows, "PARTS", PARTS)
    return lambda shapes_only: ledger_of(run_of("compactbiobert"), shapes_only=shapes_only)


def launches(ledger):
    return [o for o in ledger.operations if o.name.startswith("triton.")]


def check(ledger):
    """What is known of the launches of a toy step."""
    found = launches(ledger)
    flops, read, written = Counter(), Counter(), Counter()
    for o in found:
        flops[o.name] += o.flops
        read[o.name] += o.bytes_read
        written[o.name] += o.bytes_written
    # Attention once a layer of either model, "add & norm" twice; backward of the student's alone.
    assert Counter((o.name, o.phase) for o in found) == {
        ("triton.attention", TEACHER): TEACHER_LAYERS * MICRO_BATCHES,
        ("triton.attention", STUDENT): LAYERS * MICRO_BATCHES,
        ("triton.query_gradient", BACKWARD): LAYERS * MICRO_BATCHES,
        ("triton.key_gradient", BACKWARD): LAYERS * MICRO_BATCHES,
        ("triton.add_and_norm", TEACHER): 2 * TEACHER_LAYERS * MICRO_BATCHES,
        ("triton.add_and_norm", STUDENT): 2 * LAYERS * MICRO_BATCHES,
        ("triton.add_and_norm_gradient", BACKWARD): 2 * LAYERS * MICRO_BATCHES,
        ("triton.cosine", LOSSES): LEVELS * MICRO_BATCHES,
        ("triton.cosine_gradient", BACKWARD): LEVELS * MICRO_BATCHES,
        ("triton.vocabulary_rows", LOSSES): MICRO_BATCHES,
    }
    # Scores and P V, and of a layer that follows the teacher's scores; in backward the scores once
    # more, and for queries dP and dQ, for keys dP, dV and dK.
    product = 2 * PAIRS * H
    assert +flops == {
        "triton.attention": (TEACHER_LAYERS * 2 + LAYERS * 3) * product,
        "triton.query_gradient": LAYERS * 4 * product,
        "triton.key_gradient": LAYERS * 5 * product,
    }
    rows = B * S
    heads, lse = rows * H * 4, B * N * S * 4
    mask = rows * 8 + B * 8  # and where each sequence ends
    one_tile_a_head = B * N * 4
    assert read["triton.attention"] == TEACHER_LAYERS * (3 * heads + mask) + LAYERS * (
        5 * heads + mask
    )
    assert written["triton.attention"] == (TEACHER_LAYERS + LAYERS) * heads + LAYERS * (
        2 * lse + one_tile_a_head
    )
    upstream = MICRO_BATCHES * 4
    inputs = 5 * heads + mask + 2 * lse + upstream
    assert read["triton.query_gradient"] == LAYERS * (inputs + 2 * heads)  # context, its gradient
    assert written["triton.query_gradient"] == LAYERS * (heads + lse)
    assert read["triton.key_gradient"] == LAYERS * (inputs + heads + lse)
    assert written["triton.key_gradient"] == LAYERS * 2 * heads
    weights, statistics = MICRO_BATCHES * 2 * H * 4, 2 * rows * 4
    norms = 2 * LAYERS
    assert read["triton.add_and_norm"] == (norms + 2 * TEACHER_LAYERS) * (2 * heads + weights)
    assert written["triton.add_and_norm"] == 2 * TEACHER_LAYERS * heads + norms * (
        heads + statistics
    )
    assert read["triton.add_and_norm_gradient"] == norms * (3 * heads + weights // 2 + statistics)
    parts = MICRO_BATCHES * 2 * PARTS * H * 4
    assert written["triton.add_and_norm_gradient"] == norms * (2 * heads + parts)
    assert read["triton.cosine"] == LEVELS * rows * (2 * H * 4 + 8)
    assert written["triton.cosine"] == LEVELS * rows * 4
    assert read["triton.cosine_gradient"] == LEVELS * (rows * (2 * H * 4 + 8) + upstream)
    assert written["triton.cosine_gradient"] == LEVELS * heads
    W = V + -V % 64
    assert read["triton.vocabulary_rows"] == 2 * M * W * 4 + MICRO_BATCHES * 2 * V * 4 + M * 8
    assert written["triton.vocabulary_rows"] == M * W * 4 + 2 * M * 4
    assert all(o.lines[0][0].startswith("minibert/ops/kernels/") for o in found)
    assert {o.name.removeprefix("triton."): o.function for o in found} == {
        "attention": "_Attention",
        "query_gradient": "_Attention",
        "key_gradient": "_Attention",
        "add_and_norm": "_AddAndNorm",
        "add_and_norm_gradient": "_AddAndNorm",
        "cosine": "_HiddenStateLoss",
        "cosine_gradient": "_HiddenStateLoss",
        "vocabulary_rows": "_VocabularyLoss",
    }


def test_launches_by_shapes_alone(step_with_kernels):
    """No map is made, and nobody asks how long a sequence is."""
    ledger = step_with_kernels(True)
    check(ledger)
    asked = [o for o in ledger.operations if asked_in(o, "ops.attention_and_map_loss(")]
    assert len(asked) > 3 * LAYERS * MICRO_BATCHES
    assert not any(shape[-2:] == (S, S) for o in ledger.operations for shape, _ in o.outputs)
    assert not any("nonzero" in o.name for o in asked)
    numbers = [o for o in asked if "_local_scalar_dense" in o.name]
    assert {o.lines[0][0] for o in numbers} == {"minibert/ops/kernels/draws.py"}  # of the host


@pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, by the test below")
def test_launches_in_the_interpreter(step_with_kernels):
    real, shapes = step_with_kernels(False), step_with_kernels(True)
    check(real)
    told = [[(o.name, o.inputs, o.outputs, o.lines) for o in launches(x)] for x in (real, shapes)]
    assert told[0] == told[1]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_launches_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider", "-k", "in_the_int"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
