"""The files that hold the weights of a Hugging Face checkpoint, read without running anything.

One file or several shards with an index, safetensors or `torch.save`; what the tensors mean is
the business of `convert_weights.py`.
"""

from pathlib import Path

from torch import Tensor

from minibert.errors import InputError
from minibert.files import read_json
from minibert.folder import read_tensors
from minibert.torch_save import read_torch_save

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
