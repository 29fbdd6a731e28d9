"""Checkpoints in and out: a Hugging Face BERT to a model folder of ours, and back, bit for bit.

    python convert_weights.py biobert-hf models/biobert    a teacher, from folder or file
    python convert_weights.py --to-hf MODEL FOLDER         what any BERT tool reads

One total table of names serves both ways: every tensor of a source is used or dropped by name,
every tensor of ours is filled, and anything else is an error that lists them all. Nothing is
rounded: a float16 tensor stays float16 (`load_model` widens it when it is used).
"""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minibert.config import BertConfig
from minibert.data.tokenizer import SPECIAL_TOKENS, TOKENIZER_FILES, load_tokenizer
from minibert.errors import ArgumentParser, InputError, run_command
from minibert.files import atomic_folder, read_json, sha256_of_files, write_json
from minibert.folder import CONFIG, FLOATS, fill_folder, read_folder, tensor_shapes
from minibert.hugging_face import find_checkpoint, read_checkpoint
from minibert.model import BertForMaskedLM, BertModel

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
# fmt: on
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
TOKENIZER_CONFIG = "tokenizer_config.json"  # which only Hugging Face reads


def names_of(num_hidden_layers: int) -> dict[str, str | None]:
    """The table for a model of so many layers, each tensor by its full name."""
    names = {}
    for theirs, ours in NAMES.items():
        layers = range(num_hidden_layers) if "#" in theirs else [0]
        kinds = ("weight", "bias") if "*" in theirs else [""]
        for layer, kind in product(map(str, layers), kinds):
            full_name = theirs.replace("#", layer).replace("*", kind)
            names[full_name] = ours and ours.replace("#", layer).replace("*", kind)
    return names


def hugging_face_names_of(num_hidden_layers: int) -> dict[str, str]:
    """The table from right to left; of tied tensors the upper name stands."""
    names = names_of(num_hidden_layers)
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


def from_hugging_face(
    source: Path, out: Path, encoder_only: bool = False, drop: Sequence[str] = ()
) -> str:
    """Write the model folder `out` from a Hugging Face folder or file; returns a summary."""
    refuse_existing(out)
    checkpoint = find_checkpoint(source)
    folder = checkpoint.parent
    config = BertConfig.read(folder / CONFIG)
    tokenizer = check_tokenizer(folder, config)
    tensors, files = read_checkpoint(checkpoint)
    if "embeddings.layer_norm.weight" in tensors:
        raise InputError(f"{source}: a model folder of minibert already (--to-hf is the way back)")
    model_class = BertModel if encoder_only else BertForMaskedLM
    try:
        ours = to_our_names(tensors, config, model_class, drop)
    except InputError as error:
        raise InputError(f"{checkpoint}: {error}") from None
    provenance = {
        "source": ", ".join(file.name for file in files),
        "source_sha256": ", ".join(sha256_of_files(file) for file in files),
    }
    with atomic_folder(out) as partial:
        fill_folder(partial, ours.tensors, config, model_class, folder, provenance)

    teach = f"python train.py --teacher {out} --data CORPUS --out RUN"
    export = f"python convert_weights.py --to-hf {out} FOLDER"
    return summary(
        read=f"{checkpoint}: {len(tensors)} tensors",
        tied=", ".join(ours.tied),
        dropped=", ".join(ours.dropped),
        wrote=f"{out}: {model_class.__name__}, {sizes_of(ours.tensors, config)}",
        tokenizer=", ".join(tokenizer) or "none found; the folder needs its vocab.txt",
        next=export if encoder_only else teach,
    )


def to_hugging_face(model: Path, out: Path) -> str:
    """Write the Hugging Face folder `out` from a model folder of ours; returns a summary."""
    refuse_existing(out)
    model_class, config, tensors, metadata = read_folder(model)
    tokenizer = check_tokenizer(model, config)
    names = hugging_face_names_of(config.num_hidden_layers)
    prefix = "bert." if model_class is BertModel else ""  # which a bare encoder does not have
    theirs = {names[ours].removeprefix(prefix): tensor for ours, tensor in tensors.items()}
    with atomic_folder(out) as partial:
        fill_folder(partial, theirs, config, model_class, model, metadata | {"format": "pt"})
        if tokenizer:
            settings = read_json(partial / CONFIG)
            pad_token_id = load_tokenizer(model).pad_id
            write_json(partial / CONFIG, settings | {"pad_token_id": pad_token_id})
            write_json(partial / TOKENIZER_CONFIG, tokenizer_settings(tokenizer, config))

    auto_class = "AutoModel" if model_class is BertModel else "AutoModelForMaskedLM"
    return summary(
        read=f"{model}: {len(tensors)} tensors",
        wrote=f"{out}: {model_class.__name__}, {sizes_of(tensors, config)}",
        tokenizer=", ".join(tokenizer) or "none found; the folder needs its vocab.txt",
        next=f'transformers.{auto_class}.from_pretrained("{out}")',
    )


def refuse_existing(out: Path) -> None:
    """Nothing is ever replaced: a converted model may be the start of runs."""
    if out.exists() or out.is_symlink():
        raise InputError(f"{out}: exists already; expected the name of a new folder")


def check_tokenizer(folder: Path, config: BertConfig) -> list[str]:
    """The tokenizer files of a folder, after making sure that they fit the embeddings."""
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for name in found:
        tokens = load_tokenizer(folder / name).vocab_size
        if tokens > config.vocab_size or (name == "vocab.txt" and tokens != config.vocab_size):
            raise InputError(
                f"{folder / name}: {tokens} tokens; vocab_size in {CONFIG} is {config.vocab_size}"
            )
    settings = folder / TOKENIZER_CONFIG
    if found == ["vocab.txt"] and settings.is_file() and read_json(settings).get("do_lower_case"):
        raise InputError(
            f"{settings}: do_lower_case is true, but a vocab.txt is read as cased here "
            f"(an uncased model needs its tokenizer.json)"
        )
    return found


def tokenizer_settings(tokenizer: list[str], config: BertConfig) -> dict[str, object]:
    """`tokenizer_config.json` for `AutoTokenizer`: a tokenizer.json is taken as it is.

    `BertTokenizer` would build its own pre-tokenizer and lower-casing over it.
    """
    custom = "tokenizer.json" in tokenizer
    return {
        "tokenizer_class": "PreTrainedTokenizerFast" if custom else "BertTokenizer",
        "do_lower_case": False,
        "model_max_length": config.max_position_embeddings,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name.removesuffix('_id')}_token": text for name, text in SPECIAL_TOKENS.items()},
    }


def sizes_of(tensors: Mapping[str, Tensor], config: BertConfig) -> str:
    """For people: layers, width, vocabulary, tensors, parameters, dtypes."""
    parameters = sum(tensor.numel() for tensor in tensors.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return (
        f"{config.num_hidden_layers} layers x {config.hidden_size}, {config.vocab_size} tokens; "
        f"{parameters:,} parameters in {len(tensors)} tensors, {' and '.join(dtypes)}"
    )


def summary(**lines: str) -> str:
    """One line for each thing there is to say."""
    return "\n".join(f"{title:10}{text}" for title, text in lines.items() if text)


def main() -> None:
    parser = ArgumentParser(
        prog="convert_weights.py",
        usage="%(prog)s SOURCE OUT [--encoder-only] [--drop PATTERN ...]\n"
        "       %(prog)s --to-hf MODEL OUT",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="a Hugging Face folder, or a file of one: model.safetensors, "
        "model.safetensors.index.json (sharded) or pytorch_model.bin, with config.json and "
        "vocab.txt or tokenizer.json beside it; with --to-hf, a model folder of minibert",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; a new one")
    parser.add_argument("--to-hf", action="store_true", help="write a Hugging Face folder")
    encoder_only = "take the encoder alone, head or no head; such a model cannot be a teacher"
    parser.add_argument("--encoder-only", action="store_true", help=encoder_only)
    drop = "leave out the source tensors whose names match, such as 'classifier.*'; repeatable"
    parser.add_argument("--drop", metavar="PATTERN", action="append", default=[], help=drop)
    flags = parser.parse_args()
    if flags.to_hf and (flags.encoder_only or flags.drop):
        parser.error("--encoder-only and --drop are for reading a source, not for --to-hf")
    if flags.to_hf:
        print(to_hugging_face(flags.source, flags.out))
    else:
        print(from_hugging_face(flags.source, flags.out, flags.encoder_only, flags.drop))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
