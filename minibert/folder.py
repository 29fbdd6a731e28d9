"""A model folder: `model.safetensors`, `config.json` and the tokenizer's files.

The tensors carry our own names and the tied matrix stands once; `convert_weights.py` translates
from and to Hugging Face's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minibert.config import BertConfig
from minibert.data.tokenizer import TOKENIZER_FILES
from minibert.errors import InputError
from minibert.files import atomic_folder, file_size, parse_json, read_json, write_json
from minibert.model import BertForMaskedLM, BertModel

Model = TypeVar("Model", bound=BertModel)
WEIGHTS, CONFIG = "model.safetensors", "config.json"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # what weights may be
LARGEST_HEADER = 1 << 22  # bytes that say which tensors a file holds; BERT's have 20,000


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file and its metadata; a damaged file is an InputError.

    The tensors are the file itself, mapped: until they are copied they take no memory.
    """
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: not a whole safetensors file ({reason})") from None


def _check_header(path: Path) -> None:
    """Refuse what the library lets pass: any number of names, one that stands twice (the last
    would count), one that would write elsewhere on the screen."""
    size = file_size(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(LARGEST_HEADER, size - 8):
            raise InputError(f"{path}: not a whole safetensors file (a header of {length:,} bytes)")
        header = file.read(length)
    try:
        names = parse_json(header)
        if not isinstance(names, dict) or not all(map(str.isprintable, names)):
            raise ValueError("no dict of printable names")
    except ValueError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; one that cannot be written (a full disk) is an InputError."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # safetensors would leave the file to its owner alone
    try:
        save_file(contiguous, path, metadata=dict(metadata or {}))
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be written ({error})") from None
    path.chmod(mode)


def save_model(folder: Path, model: BertModel, tokenizer_from: Path) -> None:
    """Write `model` as a model folder, whole or not at all, with another folder's tokenizer."""
    if not any((tokenizer_from / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"{tokenizer_from}: no {' or '.join(TOKENIZER_FILES)} to go with the model"
        )
    with atomic_folder(folder) as partial:
        fill_folder(partial, model.state_dict(), model.config, type(model), tokenizer_from)


def fill_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: BertConfig,
    model_class: type[BertModel],
    tokenizer_from: Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors and config into a folder, and copy the tokenizer's files from another."""
    write_tensors(folder / WEIGHTS, tensors, metadata)
    settings = {"architectures": [model_class.__name__]} | config.to_dict()
    write_json(folder / CONFIG, settings)
    for name in TOKENIZER_FILES:
        if (tokenizer_from / name).is_file():  # copyfile would name it where it cannot write
            (folder / name).write_bytes((tokenizer_from / name).read_bytes())


class ModelFolder(NamedTuple):
    """What a model folder holds, as it is stored."""

    model_class: type[BertModel]
    config: BertConfig
    tensors: dict[str, Tensor]  # exactly those that the class and the sizes call for
    metadata: dict[str, str]


class _NothingDrawn(TorchFunctionMode):
    """Weights stay as they are allocated: `torch.nn.init` gives them back untouched.

    On the meta device there is nothing to fill, yet the first draw there imports torch.compile:
    two seconds of each command that reads a model.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def empty_model(model_class: type[Model], config: BertConfig) -> Model:
    """A model whose tensors have shapes but no memory, to be filled by `load_state_dict`."""
    with torch.device("meta"), _NothingDrawn():
        return model_class(config)


def tensor_shapes(model_class: type[BertModel], config: BertConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a model's tensors."""
    model = empty_model(model_class, config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def read_folder(folder: Path) -> ModelFolder:
    """Read a model folder without changing a bit of it.

    Raises InputError where the folder is not one of ours or its tensors are not exactly those that
    `config.json` calls for.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    config = BertConfig.read(folder / CONFIG)
    named = read_json(folder / CONFIG).get("architectures")
    model_class = BertModel if named == [BertModel.__name__] else BertForMaskedLM
    tensors, metadata = read_tensors(folder / WEIGHTS)
    if any(name.startswith(("bert.", "cls.", "encoder.")) for name in tensors):
        raise InputError(
            f"{folder}: a Hugging Face folder; convert it first: "
            f"python convert_weights.py {folder} OUT"
        )
    if any(name.startswith(("classifier.", "qa_outputs.")) for name in tensors):
        raise InputError(f"{folder}: fine-tuned; expected an encoder or a masked-language model")
    check_tensors(tensors, tensor_shapes(model_class, config), folder / WEIGHTS)
    return ModelFolder(model_class, config, tensors, metadata)


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: Path
) -> None:
    """Refuse tensors that are not exactly the expected ones, floats of these shapes."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise InputError(
                f"{source}: {name} has shape {found.get(name, 'missing')}; "
                f"config.json calls for {expected.get(name, 'no such tensor')}"
            )
        if tensors[name].dtype not in FLOATS:
            raise InputError(f"{source}: {name} is {tensors[name].dtype}; expected floats")


def is_model_folder(folder: Path) -> bool:
    """Whether the tensors in a folder carry our names, and not Hugging Face's."""
    weights = folder / WEIGHTS
    return weights.is_file() and "embeddings.layer_norm.weight" in read_tensors(weights)[0]


def load_model(folder: Path) -> BertModel:
    """Read a model folder: a `BertForMaskedLM`, or a `BertModel` where it has no head.

    Raises InputError as `read_folder` and `build_model` do.
    """
    model_class, config, tensors, _ = read_folder(folder)
    return build_model(model_class, config, tensors, folder / WEIGHTS)


def build_model(
    model_class: type[BertModel], config: BertConfig, tensors: Mapping[str, Tensor], source: Path
) -> BertModel:
    """A model of its tensors, which become float32, in memory of their own; in eval mode.

    source: the file that an error names. Raises InputError for weights that are not finite:
    nothing can be computed with them, so the file is damaged.
    """
    model = empty_model(model_class, config)
    weights = {name: t.to(torch.float32, copy=True) for name, t in tensors.items()}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise InputError(f"{source}: {name} holds NaN or numbers beyond float32")
    model.load_state_dict(weights, assign=True)
    return model.eval()
