"""The FLOPs of a training step and the parameters of a model, by formula.

A product of (m, k) by (k, n) is m k n multiplications, each with an addition: 2 m k n FLOPs. The
gradient of a product is two of the same size, one for each factor. All else (softmax, GELU,
LayerNorm, look-ups, the update) is counted as 0, here as in the ledger.

Shapes: B batch, S sequence, H hidden (H_s the student's, H_t the teacher's), I intermediate, L
layers, V vocabulary, M masked positions, P positions; of one micro-batch. A pair is an element of
an attention map: a query with a key, of one head; it takes a product of D numbers, and N heads
have N D = H. There are B S^2 pairs a head; m^2 for each sequence of n real tokens where padding is
left out, with m `attention.rounded_up(n)`.
"""

from collections import Counter
from collections.abc import Iterable
from functools import cache
from inspect import getsourcelines

import torch
from torch import Tensor

from minibert.config import BertConfig
from minibert.data.batches import MicroBatch
from minibert.ledger.record import BACKWARD, LOSSES, ROOT, STUDENT, TEACHER, Operation
from minibert.ops import fused, plain
from minibert.ops.attention import rounded_up
from minibert.recipes import ATTENTION_LOSSES, HIDDEN_LOSSES
from minibert.run_config import RunConfig

Part = tuple[str, str]  # a phase; "layers.3", "head", "projection" or the name of a loss

VOCABULARY_LOSS = "vocabulary_loss"
LOSS_NAMES = (VOCABULARY_LOSS, *HIDDEN_LOSSES.values(), *ATTENTION_LOSSES.values())


def parameters(config: BertConfig) -> dict[str, int]:
    """Numbers that a model learns, by part; the decoder is the matrix of word embeddings."""
    H, I, V = config.hidden_size, config.intermediate_size, config.vocab_size
    P, types = config.max_position_embeddings, config.type_vocab_size
    norm = 2 * H  # weight and bias
    # Query, key, value and attention output; up and down, with their biases; two LayerNorms.
    layer = 4 * (H * H + H) + (H * I + I) + (I * H + H) + 2 * norm
    layers = {f"layers.{i}": layer for i in range(config.num_hidden_layers)}
    head = (H * H + H) + norm + V  # the transform, its LayerNorm, the decoder's bias
    return {"embeddings": (V + P + types) * H + norm, **layers, "head": head}


def step_flops(
    student: BertConfig,
    teacher: BertConfig | None,
    run: RunConfig,
    micro_batches: Iterable[MicroBatch],
) -> Counter[Part]:
    """FLOPs of an update on a CPU, by phase and part; parts that take none are left out.

    teacher: None where the run follows none. `plain` and `fused` differ in this:
    - fused forms a loss's gradient with its value; plain in backward;
    - fused compares maps where attention makes them, in the student's layers, and its backward pass
      has one gradient of the scores for both; plain forms the student's scores anew, in the losses'
      phase, and has two;
    - fused attention leaves padding out, but for what a length is rounded up by.
    Tiles change nothing: what is cut is computed once.
    """
    flops: Counter[Part] = Counter()
    for batch in micro_batches:
        B, S = batch.input_ids.shape
        M, pairs = len(batch.masked_positions), B * S * S
        if run.ops == "fused":
            pairs = sum(rounded_up(n) ** 2 for n in lengths(batch.attention_mask))
        if teacher is not None:
            flops.update(_forward(TEACHER, teacher, B * S, pairs, M))
        flops.update(_forward(STUDENT, student, B * S, pairs, M))
        flops.update(_backward(student, B * S, pairs, M))
        if teacher is not None:
            flops.update(_map_losses(student, teacher, run, pairs))
            flops.update(_projection(student, teacher, run, B * S))
        flops.update(_vocabulary_loss(student, teacher, run, M))
    return +flops


def lengths(attention_mask: Tensor) -> list[int]:
    """Of the sequences in (B, S), also where several stand in a row (`plain.same_sequence`)."""
    counts = [row.bincount()[1:] for row in attention_mask]  # behind the first: padding
    return [int(n) for n in torch.cat(counts)]


def _product(rows: int, inputs: int, outputs: int) -> int:
    """(rows, inputs) by (inputs, outputs)."""
    return 2 * rows * inputs * outputs


def _linears(config: BertConfig, tokens: int) -> int:
    """A layer's: query, key, value and attention output, (H, H) each; up (H, I), down (I, H).

    2 T (4 H^2 + 2 H I), for T tokens.
    """
    H, I = config.hidden_size, config.intermediate_size
    return 4 * _product(tokens, H, H) + _product(tokens, H, I) + _product(tokens, I, H)


def _forward(
    phase: str, config: BertConfig, tokens: int, pairs: int, masked: int
) -> dict[Part, int]:
    """A layer: its linear maps, Q K^T and P V of all heads, 2 pairs H each. The head: one linear
    map (H, H), at the masked positions. The embeddings are looked up.
    """
    H, L = config.hidden_size, config.num_hidden_layers
    layer = _linears(config, tokens) + 2 * (2 * pairs * H)
    head = _product(masked, H, H)
    return {(phase, f"layers.{i}"): layer for i in range(L)} | {(phase, "head"): head}


def _backward(config: BertConfig, tokens: int, pairs: int, masked: int) -> dict[Part, int]:
    """Twice the forward pass: each product has two factors, and each a gradient. The first layer's
    input has one too, since the embeddings learn. Of the attention: dP, dV, dQ, dK.
    """
    H, L = config.hidden_size, config.num_hidden_layers
    layer = 2 * _linears(config, tokens) + 4 * (2 * pairs * H)
    head = 2 * _product(masked, H, H)
    return {(BACKWARD, f"layers.{i}"): layer for i in range(L)} | {(BACKWARD, "head"): head}


def _map_losses(
    student: BertConfig, teacher: BertConfig, run: RunConfig, pairs: int
) -> dict[Part, int]:
    """Of each compared pair of layers the scores of the teacher's map, 2 pairs H_t. Plain forms the
    student's anew, 2 pairs H_s, and has gradients of its queries and keys, 2 pairs H_s each, beside
    attention's own; in fused attention both come from one gradient of the scores.
    """
    if run.ops == "fused":  # in the student's layers, which have its scores
        value = 2 * pairs * teacher.hidden_size
        return {(STUDENT, f"layers.{i}"): value for i, _ in run.attention_pairs}
    part = ATTENTION_LOSSES[run.recipe.attention_loss]
    value = 2 * pairs * (student.hidden_size + teacher.hidden_size)
    gradient = 2 * (2 * pairs * student.hidden_size)
    return _value_and_gradient(run, part, len(run.attention_pairs), value, gradient)


def _vocabulary_loss(
    student: BertConfig, teacher: BertConfig | None, run: RunConfig, masked: int
) -> dict[Part, int]:
    """The logits of both models, 2 M V (H_s + H_t); the gradients of the student's head output and
    decoder, 2 M V H_s each. Hidden states are compared without any product.
    """
    V, H = student.vocab_size, student.hidden_size
    widths = H + (0 if teacher is None else teacher.hidden_size)
    value, gradient = _product(masked, widths, V), 2 * _product(masked, H, V)
    return _value_and_gradient(run, VOCABULARY_LOSS, 1, value, gradient)


def _value_and_gradient(
    run: RunConfig, part: str, times: int, value: int, gradient: int
) -> dict[Part, int]:
    """Where a loss's products are counted: fused forms the gradient together with the value."""
    if run.ops == "fused":
        return {(LOSSES, part): times * (value + gradient)}
    return {(LOSSES, part): times * value, (BACKWARD, part): times * gradient}


def _projection(
    student: BertConfig, teacher: BertConfig, run: RunConfig, tokens: int
) -> dict[Part, int]:
    """A narrower student's embedding output and hidden states, brought to H_t: L + 1 products;
    backward is twice those that are compared.
    """
    if not run.hidden_pairs or student.hidden_size == teacher.hidden_size:
        return {}
    once = _product(tokens, student.hidden_size, teacher.hidden_size)
    levels, compared = student.num_hidden_layers + 1, len(run.hidden_pairs)
    return {
        (STUDENT, "projection"): levels * once,
        (BACKWARD, "projection"): compared * 2 * once,
    }


def flops_by_part(operations: Iterable[Operation]) -> Counter[Part]:
    """What a ledger counted, as `step_flops` has it."""
    flops: Counter[Part] = Counter()
    for operation in operations:
        flops[operation.phase, part_of(operation)] += operation.flops
    return +flops


def part_of(operation: Operation) -> str:
    """The part of the step that asked for an operation, or ""."""
    for file, number in operation.lines:  # first, for a loss of maps is asked for by a layer
        for name, spans in _losses().items():
            if any(file == where and number in lines for where, lines in spans):
                return name
    names = operation.module.split(".")
    for i, name in enumerate(names):
        if name in ("embeddings", "head", "projection"):
            return name
        if name == "layers":
            return ".".join(names[i : i + 2])
    return ""


@cache
def _losses() -> dict[str, list[tuple[str, range]]]:
    """Where each loss stands in our source: file and lines, plain and fused."""
    places: dict[str, list[tuple[str, range]]] = {name: [] for name in LOSS_NAMES}
    for name, spans in places.items():
        for ops in (plain, fused):
            function = getattr(ops, name)
            lines, first = getsourcelines(function)
            file = function.__code__.co_filename.removeprefix(f"{ROOT}/")
            spans.append((file, range(first, first + len(lines))))
    return places
