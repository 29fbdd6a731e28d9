"""The tensors of a `torch.save` file, read without running anything.

Such a file says by a pickle, a program, which tensors it holds. Here nobody runs it: its opcodes
are read as data, the few that describe tensors are understood, and any other is refused. Nor does
a file get more memory than about twice its size, whatever it claims.
"""

import math
import pickletools
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor

from minibert.errors import InputError
from minibert.files import file_size

LARGEST_PICKLE = 1 << 22  # bytes; that of BERT-large has 40,000
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."  # two pickles: magic, 1001
DTYPES = {
    f"torch.{kind}Storage": dtype
    for kind, dtype in {
        "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Double": torch.float64, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
        "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    }.items()
}  # fmt: skip


class _Storage(NamedTuple):
    """A run of numbers in a `torch.save` file."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class _View(NamedTuple):
    """A tensor as a pickle describes it; offset and strides in numbers of its storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Name(str):
    """What a pickle calls something: never looked up."""


class _Refused(Exception):
    """A file that can be read, but holds something else than tensors."""


def read_torch_save(path: Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save` file: a zip archive or, before torch 1.6, pickles end to end.

    What is damaged, or holds anything but a dict of names and dense tensors, is an InputError.
    """
    size = file_size(path)
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _read_zipped(file, size) if zipped else _read_legacy(file, size)
    except _Refused as error:
        raise InputError(f"{path}: {error}") from None
    except Exception:  # damaged bytes make the readers raise nearly anything
        raise InputError(f"{path}: damaged, or not a PyTorch checkpoint") from None


def _read_zipped(file: BinaryIO, size: int) -> dict[str, Tensor]:
    """`NAME/data.pkl` describes the tensors, `NAME/data/KEY` holds a storage; none compressed."""
    with ZipFile(file) as archive:
        members = archive.infolist()
        if any(member.compress_type != ZIP_STORED for member in members):
            raise _Refused("refused, for it is compressed; expected what torch.save writes")
        if sum(member.file_size for member in members) > size:
            raise _Refused("refused, for its parts overlap; expected what torch.save writes")
        [pickle] = [member for member in members if member.filename.endswith("/data.pkl")]
        if pickle.file_size > LARGEST_PICKLE:
            raise _Refused(f"refused, for its pickle has {pickle.file_size:,} bytes")
        folder = pickle.filename.removesuffix("data.pkl")
        byteorder = f"{folder}byteorder"
        if byteorder in archive.namelist() and archive.read(byteorder) != b"little":
            raise _Refused("refused, for its numbers are big-endian")
        storages: dict[str, _Storage] = {}
        views = _views(_described(BytesIO(archive.read(pickle)), storages), size)
        return _tensors(
            views,
            {
                key: _numbers(storage, archive.read(f"{folder}data/{key}"))
                for key, storage in storages.items()
            },
        )


def _read_legacy(file: BinaryIO, size: int) -> dict[str, Tensor]:
    """Five pickles, then each storage, its length first.

    The third tells of the machine, the fourth describes the tensors, the fifth has the storages'
    keys in the order of the file.
    """
    pickles = BytesIO(file.read(LARGEST_PICKLE))
    if pickles.read(len(LEGACY)) != LEGACY:
        raise ValueError("not of torch.save")
    storages: dict[str, _Storage] = {}
    if _described(pickles, storages)["little_endian"] is not True:
        raise _Refused("refused, for its numbers are big-endian")
    views = _views(_described(pickles, storages), size)
    keys = _described(pickles, storages)
    file.seek(pickles.tell())
    numbers = {}
    for storage in [storages[key] for key in keys]:
        if int.from_bytes(file.read(8), "little") != storage.numel or storage.nbytes > size:
            raise ValueError("a storage of another length")
        numbers[storage.key] = _numbers(storage, file.read(storage.nbytes))
    return _tensors(views, numbers)


def _described(file: BinaryIO, storages: dict[str, _Storage]) -> Any:
    """What the next pickle of `file` describes; storages that it names are added to `storages`.

    A pickle builds things on a stack (`pickletools` has the opcodes). These are all that state
    dicts need; of those that call something, REDUCE calls one of ours and BUILD, which would set
    attributes, none.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # what waits under each MARK
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO":
                pass
            case "BINUNICODE" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT":
                stack.append({"TUPLE": (), "LIST": [], "DICT": {}}[opcode.name[6:]])
            case "GLOBAL":
                stack.append(_Name(argument.replace(" ", ".")))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE" | "APPENDS" | "SETITEMS":
                items, stack = stack, below.pop()
                _put(opcode.name, stack, items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3" | "APPEND" | "SETITEM":
                count = {"TUPLE2": 2, "TUPLE3": 3, "SETITEM": 2}.get(opcode.name, 1)
                items = [stack.pop() for _ in range(count)][::-1]
                _put(opcode.name, stack, items)
            case "BINPERSID":
                storage = _storage(stack.pop())
                if storages.setdefault(storage.key, storage) != storage:
                    raise ValueError("one storage as two")
                stack.append(storage)
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_called(stack.pop(), arguments))
            case "BUILD":
                stack.pop()
            case "STOP":
                return stack.pop()
            case other:
                raise _Refused(f"refused, for it holds more than tensors ({other} in its pickle)")
    raise ValueError("no end")


def _put(opcode: str, stack: list[Any], items: list[Any]) -> None:
    """Make a tuple of items, or add them to the list or dict on top of the stack."""
    if opcode.startswith("TUPLE"):
        stack.append(tuple(items))
    elif opcode.startswith("APPEND"):
        stack[-1].extend(items)
    else:
        keys, values = items[::2], items[1::2]
        if not all(type(key) in (str, int) for key in keys):  # a tuple's hash can take for ever
            raise _Refused("expected a dict of names and tensors (a state dict)")
        stack[-1].update(zip(keys, values, strict=True))


def _storage(identity: tuple[Any, ...]) -> _Storage:
    """A storage by its persistent id: ("storage", type, key, device, numel), formerly also None."""
    kind, name, key, _, numel, *view = identity
    if kind != "storage" or type(key) is not str or type(numel) is not int or numel < 0:
        raise ValueError("not a storage")
    if name not in DTYPES or view not in ([], [None]):
        raise _Refused(f"refused, for it holds numbers of another kind ({name})")
    return _Storage(key, DTYPES[name], numel)


def _called(function: Any, arguments: tuple[Any, ...]) -> Any:
    """What a call in a pickle stands for. Nothing of the pickle's choice is called."""
    match function, arguments:
        case "collections.OrderedDict", ():
            return {}
        case "torch._utils._rebuild_tensor_v2", (_Storage() as storage, offset, shape, strides, *_):
            return _View(storage, offset, shape, strides)
        case "torch._utils._rebuild_parameter", (_View() as view, *_):
            return view
    if not isinstance(function, _Name):
        raise ValueError("a call of nothing")
    raise _Refused(f"refused, for it holds code ({function[:100]}); expected tensors alone")


def _views(content: Any, size: int) -> dict[str, _View]:
    """The content of a pickle if it is a state dict whose tensors fit in a file of `size` bytes.

    Tied tensors share a storage, so twice the size is allowed. More is an attack: a stride of 0
    makes a tensor of any shape from one number.
    """
    if not isinstance(content, dict):
        raise _Refused("expected a dict of names and tensors (a state dict)")
    room = 2 * size
    for name, view in content.items():
        if type(name) is not str or not isinstance(view, _View):
            raise _Refused("expected a dict of names and tensors (a state dict)")
        if len(view.shape) > 8 or any(type(n) is not int or n < 0 for n in view.shape):
            raise ValueError("not a shape")
        room -= math.prod(view.shape) * view.storage.dtype.itemsize
        if room < 0:
            raise _Refused("refused, for its tensors together are larger than twice the file")
    return content


def _numbers(storage: _Storage, content: bytes) -> Tensor:
    """(numel,) the numbers of a storage."""
    if len(content) != storage.nbytes:
        raise ValueError("a storage of another length")
    if not content:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(bytearray(content), dtype=storage.dtype)


def _tensors(views: dict[str, _View], numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by name; one that reaches beyond its storage is a RuntimeError."""
    return {
        name: numbers[view.storage.key].as_strided(view.shape, view.strides, view.offset)
        for name, view in views.items()
    }
