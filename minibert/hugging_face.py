"""The files of a Hugging Face checkpoint, read without running anything; models from them.

One file or several shards with an index, safetensors or `torch.save`; what the tensors mean is
the business of `minibert/names.py`.
"""

import pickle
import re
import warnings
from os import PathLike
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from torch import Tensor

from minibert.config import BertConfig
from minibert.data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from minibert.errors import InputError
from minibert.files import file_size, read_json
from minibert.folder import CONFIG, build_model, is_model_folder, load_model, read_tensors
from minibert.model import BertForMaskedLM, BertModel
from minibert.names import to_our_names

INDEX = ".index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"  # which only Hugging Face reads
CHECKPOINTS = tuple(  # in a folder, the first that exists is read
    name + ending for name in ("model.safetensors", "pytorch_model.bin") for ending in ("", INDEX)
)


def find_checkpoint(source: Path) -> Path:
    """The file that `source` is or holds."""
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    if not source.is_dir():
        if not source.name.endswith((".safetensors", ".bin", INDEX)):
            raise InputError(f"{source}: expected a folder, *.safetensors, *.bin or *{INDEX}")
        return source
    for name in CHECKPOINTS:
        if (source / name).is_file():
            return source / name
    raise InputError(f"{source}: no checkpoint in this folder; expected {' or '.join(CHECKPOINTS)}")


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """All tensors of a checkpoint, and the files that hold them (several where it is sharded)."""
    if not path.name.endswith(INDEX):
        return _read_file(path), [path]
    places, shards = _read_index(path)
    tensors = {}
    for shard in shards:
        content = _read_file(path.parent / shard)
        announced = {name for name, place in places.items() if place == shard}
        if astray := sorted(content.keys() ^ announced):
            raise InputError(
                f"{path}: the shards hold something else; at odds: {', '.join(astray)} ({shard})"
            )
        tensors |= content
    return tensors, [path.parent / shard for shard in shards]


def weight_files(folder: Path) -> list[Path]:
    """The files that a folder's weights are in, ours or Hugging Face's; an index comes first."""
    path = find_checkpoint(folder)
    shards = _read_index(path)[1] if path.name.endswith(INDEX) else []
    return [path, *(path.parent / shard for shard in shards)]


def _read_index(path: Path) -> tuple[dict[str, str], list[str]]:
    """Which shard each tensor is in, and the names of the shards, which lie beside the index."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{path}: no weight_map that gives each tensor its file")
    if strange := [name for name in places if not name.isprintable()]:
        raise InputError(f"{path}: {strange[0][:100]!r} is no name of a tensor")
    shards = sorted(set(places.values()))
    for shard in shards:
        if Path(shard).name != shard or shard == "..":
            raise InputError(f"{path}: shard {shard!r}; expected the name of a file beside it")
    return places, shards


def _read_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, as they are stored."""
    return read_tensors(path)[0] if path.suffix == ".safetensors" else read_torch_save(path)


def read_torch_save(path: Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save` file: a pickle, of which only tensors are ever built.

    Code in it, compressed or overlapping parts, and tensors that are more than the file holds
    (a stride of 0 makes any shape of one number) are refused before they take memory.
    """
    size = file_size(path)
    try:
        _refuse_inflation(path, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a file that is refused, one line is enough
            content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        code = re.search(r"GLOBAL (\S{1,100})", str(error))
        if isinstance(error, pickle.UnpicklingError) and code:
            raise InputError(
                f"{path}: refused, for it holds code ({code[1]}); expected tensors alone"
            ) from None
        raise InputError(f"{path}: damaged, or not a PyTorch checkpoint") from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and name.isprintable() and _is_plain(tensor)
        for name, tensor in content.items()
    ):
        raise InputError(f"{path}: expected a dict of names and tensors (a state dict)")
    if sum(t.numel() * t.element_size() for t in content.values()) > 2 * size:  # some are tied
        raise InputError(f"{path}: refused, for its tensors are larger than twice the file")
    return {name: tensor.detach() for name, tensor in content.items()}


def _refuse_inflation(path: Path, size: int) -> None:
    """A zip archive, what torch.save writes since 1.6, has its parts as they are, side by side."""
    if is_zipfile(path):
        with ZipFile(path) as archive:
            parts = archive.infolist()
        stored = all(part.compress_type == ZIP_STORED for part in parts)
        if not stored or sum(part.file_size for part in parts) > size:
            raise InputError(f"{path}: refused, for it would inflate; torch.save does not compress")
        if len({part.filename for part in parts}) < len(parts):
            raise InputError(f"{path}: refused, for parts of it have one name")


def _is_plain(tensor: object) -> bool:
    """Whether it is a tensor of numbers in memory: not sparse, quantized or without any."""
    dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided
    return dense and tensor.device.type == "cpu" and not tensor.is_quantized


def check_tokenizer(folder: Path, config: BertConfig, ours: bool = False) -> list[str]:
    """The tokenizer files of a folder, after making sure that they fit the embeddings.

    A model of ours may have rows to spare; elsewhere that is a sign of the wrong vocab.txt.
    """
    found = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    for name in found:
        tokens = load_tokenizer(folder / name).vocab_size
        spare = config.vocab_size - tokens
        if spare < 0 or (spare > 0 and name == "vocab.txt" and not ours):
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


def load_either(folder: str | PathLike[str]) -> tuple[BertModel, Tokenizer]:
    """Model and tokenizer of a model folder or a Hugging Face folder; see `minibert.load`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    model = load_model(folder) if is_model_folder(folder) else load_hugging_face(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"{tokenizer.source}: {tokenizer.vocab_size} tokens; "
            f"vocab_size in {CONFIG} is {model.config.vocab_size}"
        )
    return model.requires_grad_(False), tokenizer


def load_hugging_face(folder: Path) -> BertModel:
    """The model of a Hugging Face folder, with its MLM head where the checkpoint holds one.

    In float32 and eval mode. Raises InputError as `check_tokenizer` and `to_our_names` do.
    """
    checkpoint = find_checkpoint(folder)
    config = BertConfig.read(folder / CONFIG)
    check_tokenizer(folder, config)
    tensors, _ = read_checkpoint(checkpoint)
    has_head = any(name.startswith("cls.predictions.") for name in tensors)
    model_class = BertForMaskedLM if has_head else BertModel
    try:
        ours = to_our_names(tensors, config, model_class)
    except InputError as error:
        raise InputError(f"{checkpoint}: {error}") from None
    return build_model(model_class, config, ours.tensors, checkpoint)
