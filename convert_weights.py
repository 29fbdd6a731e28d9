"""Checkpoints in and out: a Hugging Face BERT to a model folder of ours, and back, bit for bit.

    python convert_weights.py biobert-hf models/biobert    a teacher, from folder or file
    python convert_weights.py --to-hf MODEL FOLDER         what any BERT tool reads

The table of names is in `minibert/names.py`. Nothing is rounded: a float16 tensor stays float16
(`load_model` widens it when it is used).
"""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from minibert.config import BertConfig
from minibert.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from minibert.errors import ArgumentParser, InputError, run_command
from minibert.files import atomic_folder, read_json, sha256_of_files, write_json
from minibert.folder import CONFIG, fill_folder, read_folder
from minibert.heads import head_of, read_fine_tuned
from minibert.hugging_face import (
    TOKENIZER_CONFIG,
    check_tokenizer,
    find_checkpoint,
    read_checkpoint,
)
from minibert.model import BertForMaskedLM, BertModel
from minibert.names import HEAD_NAMES, hugging_face_names_of, to_our_names
from minibert.names import names_of as names_of  # the table, for those who import this command


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
    for result in (model / "student", model / "model"):
        if result.is_dir():
            raise InputError(f"{model}: the folder of a run; its model is {result}")
    is_fine_tuned = head_of(model) is not None
    stored = read_fine_tuned(model) if is_fine_tuned else read_folder(model)
    model_class, config, tensors, metadata = stored[:4]
    tokenizer = check_tokenizer(model, config, ours=True)
    L = config.num_hidden_layers
    names = hugging_face_names_of(L) | hugging_face_names_of(L, HEAD_NAMES)
    prefix = "bert." if model_class is BertModel else ""  # which a bare encoder does not have
    theirs = {names[ours].removeprefix(prefix): tensor for ours, tensor in tensors.items()}
    with atomic_folder(out) as partial:
        fill_folder(partial, theirs, config, model_class, model, metadata | {"format": "pt"})
        settings = read_json(partial / CONFIG)
        if is_fine_tuned:
            settings |= stored.label_settings
        if tokenizer:
            settings["pad_token_id"] = load_tokenizer(model).pad_id
            write_json(partial / TOKENIZER_CONFIG, tokenizer_settings(tokenizer, config))
        write_json(partial / CONFIG, settings)

    auto_class = f"AutoModel{model_class.__name__.removeprefix('Bert').removeprefix('Model')}"
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
