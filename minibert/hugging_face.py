"""The files that hold the weights of a Hugging Face checkpoint, read without running anything.

One file or several shards with an index, safetensors or `torch.save`; what the tensors mean is
the business of `convert_weights.py`.
"""

import pickle
import re
import warnings
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from torch import Tensor

from minibert.errors import InputError
from minibert.files import file_size, read_json
from minibert.folder import read_tensors

INDEX = ".index.json"
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
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{path}: no weight_map that gives each tensor its file")
    if strange := [name for name in places if not name.isprintable()]:
        raise InputError(f"{path}: {strange[0][:100]!r} is no name of a tensor")
    shards = sorted(set(places.values()))
    for shard in shards:
        if Path(shard).name != shard or shard == "..":
            raise InputError(f"{path}: shard {shard!r}; expected the name of a file beside it")
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
