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

from minibert.ledger.record import BACKWARD, LOSSES

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if torch.cuda.is_available():
    pytest.skip("here the kernels would want a GPU's tensors", allow_module_level=True)

B, S, N, H, V, M = 5, 13, 3, TOY.hidden_size, TOY.vocab_size, 10
PAIRS = B * S * S
LAYERS, LEVELS, MICRO_BATCHES = 2, 2, 3


@pytest.fixture
def step_with_kernels(monkeypatch):
    """Records a toy step in which the fused losses run as on a GPU with Triton."""
    from minibert.ops import fused, kernels, vocabulary

    monkeypatch.setattr(fused, "kernels_for", lambda tensor: kernels)
    monkeypatch.setattr(vocabulary, "kernels_for", lambda tensor: kernels)
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
    assert Counter((o.name, o.phase) for o in found) == {
        ("triton.map_loss", LOSSES): LAYERS * MICRO_BATCHES,
        ("triton.map_gradient", BACKWARD): 2 * LAYERS * MICRO_BATCHES,  # queries, then keys
        ("triton.cosine_rows", LOSSES): LEVELS * MICRO_BATCHES,
        ("triton.vocabulary_rows", LOSSES): MICRO_BATCHES,
    }
    # Scores of both; in each gradient once more scores of both, and a product with the student's.
    assert flops["triton.map_loss"] == LAYERS * 2 * PAIRS * (H + H)
    assert flops["triton.map_gradient"] == LAYERS * 2 * 2 * PAIRS * (2 * H + H)
    assert flops["triton.cosine_rows"] == flops["triton.vocabulary_rows"] == 0
    rows = B * S
    lse = B * N * S * 4
    assert read["triton.map_loss"] == LAYERS * (4 * rows * H * 4 + rows * 8)
    assert written["triton.map_loss"] == LAYERS * (2 * lse + B * N * 4)  # one tile a head
    inputs = 4 * rows * H * 4 + rows * 8 + 2 * lse + MICRO_BATCHES * 4
    assert read["triton.map_gradient"] == LAYERS * 2 * inputs
    assert written["triton.map_gradient"] == LAYERS * 2 * rows * H * 4
    assert read["triton.cosine_rows"] == LEVELS * rows * (2 * H * 4 + 8)
    assert written["triton.cosine_rows"] == LEVELS * rows * (H * 4 + 4)
    assert read["triton.vocabulary_rows"] == 2 * M * V * 4 + MICRO_BATCHES * 2 * V * 4 + M * 8
    assert written["triton.vocabulary_rows"] == M * V * 4 + 2 * M * 4
    assert all(o.lines[0][0] == "minibert/ops/kernels.py" for o in found)
    functions = {o.name.removeprefix("triton."): o.function for o in found}
    assert functions == {
        "map_loss": "_AttentionMapLossByKernels",
        "map_gradient": "_AttentionMapLossByKernels",
        "cosine_rows": "_HiddenStateLoss",
        "vocabulary_rows": "_VocabularyLoss",
    }


def test_launches_by_shapes_alone(step_with_kernels):
    """Of the maps' loss no map is made, and nobody asks how long a sequence is."""
    ledger = step_with_kernels(True)
    check(ledger)
    loss = [o for o in ledger.operations if asked_in(o, "attention_map_loss(*maps, mask)")]
    assert len(loss) > len(launches(ledger))
    assert not any(shape[-2:] == (S, S) for o in loss for shape, _ in o.outputs)
    assert not any("nonzero" in o.name or "_local_scalar_dense" in o.name for o in loss)


@pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, by the test below")
def test_launches_in_the_interpreter(step_with_kernels):
    real, shapes = step_with_kernels(False), step_with_kernels(True)
    check(real)
    told = [[(o.name, o.inputs, o.outputs, o.lines) for o in launches(x)] for x in (real, shapes)]
    assert told[0] == told[1]
    here = [o for o in real.operations if asked_in(o, "kernels.attention_map_loss_forward")]
    makes = {"aten.new_empty.default", "aten.empty_like.default", "aten.sum.default"}
    assert {o.name for o in here} - {"aten.detach.default"} == {*makes, "triton.map_loss"}


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
