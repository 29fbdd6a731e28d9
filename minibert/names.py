"""Hugging Face's names of BERT's tensors, ours, and the way from theirs to ours, bit for bit.

One total table serves both ways: every tensor of a source is used or dropped by name, every tensor
of ours is filled, and anything else is an error that lists them all. Nothing is rounded.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from minibert.config import BertConfig
from minibert.errors import InputError
from minibert.folder import FLOATS, tensor_shapes
from minibert.model import BertModel

# `#` is the number of a layer, `*` is weight and bias. None: dropped, for nothing here uses it.
# Where two rows have the same right side the tensors are one (tied): bitwise equal, stored once,
# and written back under the upper name.
# fmt: off
NAMES = {
    # Hugging Face (google-research/bert)                minibert
    "bert.embeddings.word_embeddings.weight":            "embeddings.word_embeddings.weight",
    "bert.embeddings.position_embeddings.weight":        "embeddings.position_embeddings.weight",
    "bert.embeddings.token_type_embeddings.weight":      "embeddings.token_type_embeddings.weight",
    "bert.embeddings.LayerNorm.*":                       "embeddings.layer_norm.*",
    "bert.encoder.layer.#.attention.self.query.*":       "layers.#.query.*",
    "bert.encoder.layer.#.attention.self.key.*":         "layers.#.key.*",
    "bert.encoder.layer.#.attention.self.value.*":       "layers.#.value.*",
    "bert.encoder.layer.#.attention.output.dense.*":     "layers.#.attention_output.*",
    "bert.encoder.layer.#.attention.output.LayerNorm.*": "layers.#.attention_layer_norm.*",
    "bert.encoder.layer.#.intermediate.dense.*":         "layers.#.intermediate.*",
    "bert.encoder.layer.#.output.dense.*":               "layers.#.output.*",
    "bert.encoder.layer.#.output.LayerNorm.*":           "layers.#.output_layer_norm.*",
    "cls.predictions.transform.dense.*":                 "head.dense.*",
    "cls.predictions.transform.LayerNorm.*":             "head.layer_norm.*",
    "cls.predictions.bias":                              "head.decoder_bias",
    "cls.predictions.decoder.bias":                      "head.decoder_bias",
    "cls.predictions.decoder.weight":                    "embeddings.word_embeddings.weight",
    "bert.embeddings.position_ids":                      None,  # a buffer: 0, 1, 2, ...
    "bert.pooler.dense.*":                               None,  # for the next-sentence head
    "cls.seq_relationship.*":                            None,  # the next-sentence head
}
HEAD_NAMES = {  # of fine-tuned models (`minibert/heads.py`), which are written and never read
    "bert.pooler.dense.*":                               "pooler.*",
    "classifier.*":                                      "classifier.*",
    "qa_outputs.*":                                      "qa_outputs.*",
}
# fmt: on
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def names_of(
    num_hidden_layers: int, table: Mapping[str, str | None] = NAMES
) -> dict[str, str | None]:
    """The table for a model of so many layers, each tensor by its full name."""
    names = {}
    for theirs, ours in table.items():
        layers = range(num_hidden_layers) if "#" in theirs else [0]
        kinds = ("weight", "bias") if "*" in theirs else [""]
        for layer, kind in product(map(str, layers), kinds):
            full_name = theirs.replace("#", layer).replace("*", kind)
            names[full_name] = ours and ours.replace("#", layer).replace("*", kind)
    return names


def hugging_face_names_of(
    num_hidden_layers: int, table: Mapping[str, str | None] = NAMES
) -> dict[str, str]:
    """The table from right to left; of tied tensors the upper name stands."""
    names = names_of(num_hidden_layers, table)
    return {ours: theirs for theirs, ours in reversed(names.items()) if ours is not None}


class Translation(NamedTuple):
    """A source under our names, and what was not taken over."""

    tensors: dict[str, Tensor]
    tied: list[str]  # second copies of a tensor: bitwise equal, not stored again
    dropped: list[str]


def to_our_names(
    source: Mapping[str, Tensor],
    config: BertConfig,
    model_class: type[BertModel],
    drop: Sequence[str] = (),
) -> Translation:
    """Take a checkpoint over, tensor by tensor; names that match a glob of `drop` are left out.

    Raises InputError that lists every tensor that is unknown, missing, of the wrong shape or type,
    or unequal to the one it is tied to.
    """
    shapes = tensor_shapes(model_class, config)
    names = names_of(config.num_hidden_layers)
    if model_class is BertModel:
        names |= {theirs: None for theirs in names if theirs.startswith("cls.")}

    unknown, dropped = [], []
    claims: dict[str, list[str]] = {}  # our name -> the source tensors that stand for it
    for name in source:
        if any(fnmatchcase(name, pattern) for pattern in drop):
            dropped.append(name)
        elif standard_name(name) not in names:
            unknown.append(name)
        elif (ours := names[standard_name(name)]) is None:
            dropped.append(name)
        else:
            claims.setdefault(ours, []).append(name)

    misshapen = [
        f"{name} {describe(source[name])}, not {shapes[ours]} floats"
        for ours, claimants in claims.items()
        for name in claimants
        if tuple(source[name].shape) != shapes[ours] or not is_plain(source[name])
    ]
    unequal = [
        f"{name} and {first}"
        for first, *others in claims.values()
        for name in others
        if not same_bits(source[first], source[name])
    ]
    idle = [pattern for pattern in drop if not any(fnmatchcase(name, pattern) for name in source)]
    problems = {
        "unknown tensors (--drop PATTERN leaves them out)": unknown,
        **missing_tensors([ours for ours in shapes if ours not in claims], config),
        "wrong shape or type": misshapen,
        "tied, but not equal": unequal,
        "--drop matches nothing": idle,
    }
    found = [f"{kind}: {', '.join(what)}" for kind, what in problems.items() if what]
    if found:
        raise InputError("; ".join(found))
    tensors = {ours: source[claims[ours][0]] for ours in shapes}
    tied = [name for _, *others in claims.values() for name in others]
    return Translation(without_aliases(tensors), tied, dropped)


def standard_name(name: str) -> str:
    """A name as the table has it: with `bert.`, and LayerNorm's tensors called weight and bias."""
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return f"bert.{name}" if name.startswith(("embeddings.", "encoder.", "pooler.")) else name


def missing_tensors(missing: list[str], config: BertConfig) -> dict[str, list[str]]:
    """Unfilled tensors under the names that the source should have, the head apart if all of it."""
    names = hugging_face_names_of(config.num_hidden_layers)
    head = [ours for ours in names if ours.startswith("head.")]
    if not set(head) <= set(missing):
        return {"missing tensors": [names[ours] for ours in missing]}
    return {
        "missing tensors": [names[ours] for ours in missing if ours not in head],
        "no MLM head (a teacher needs one; --encoder-only does without)": [
            names[ours] for ours in head
        ],
    }


def describe(tensor: Tensor) -> str:
    """For people: `(3, 5) int64`."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def is_plain(tensor: Tensor) -> bool:
    """Whether it is dense numbers in memory: not quantised, sparse or without content."""
    return tensor.dtype in FLOATS and tensor.layout is torch.strided and tensor.device.type == "cpu"


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equality of shape, dtype and every bit (`==` has 0 == -0 and NaN != NaN)."""
    if describe(left) != describe(right) or not is_plain(left) or not is_plain(right):
        return False
    whole_numbers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return torch.equal(left.view(whole_numbers), right.view(whole_numbers))


def without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in place of tensors that share memory with another, which safetensors does not store.

    All come back contiguous, in the order they had.
    """
    apart = {name: tensor.contiguous() for name, tensor in tensors.items()}
    end = 0
    for name in sorted(apart, key=lambda name: apart[name].data_ptr()):
        start = apart[name].data_ptr()
        if start < end:
            apart[name] = apart[name].clone()
        end = max(end, start + tensors[name].nbytes)
    return apart
