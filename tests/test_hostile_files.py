"""Nothing from outside is executed or trusted: a hostile file is refused in one line, at once.

At once: before a pipe is waited for, and before more memory is taken than the file is long.
"""

import io
import json
import os
import pickle
import pickletools
import re
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SPECIAL_TOKENS, TOY_CONFIG

import convert_weights
from minibert.config import BertConfig
from minibert.data.corpus import Corpus
from minibert.data.tokenizer import load_tokenizer
from minibert.errors import InputError
from minibert.files import read_json
from minibert.folder import load_model, read_tensors
from minibert.hugging_face import read_checkpoint, read_torch_save


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    """The one line in which `path` is refused, within a second and 100 MB; it names the file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    begun = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (size + 100_000_000, hard))
    try:
        with pytest.raises(InputError) as caught:
            read(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - begun < 1
    error = caught.value
    assert "\n" not in str(error) and len(str(error)) < 1_000 and path.name in str(error)
    while error is not None:  # no luck: without the limit it would have been taken
        assert not isinstance(error, MemoryError) and "can't allocate" not in str(error)
        error = error.__context__
    return str(error or caught.value)


# What is no file, or too large a one.

READERS = {
    "config.json": BertConfig.read,
    "meta.json": read_json,
    "vocab.txt": load_tokenizer,
    "tokenizer.json": load_tokenizer,
    "model.safetensors": read_tensors,
    "pytorch_model.bin": read_checkpoint,
    "model.safetensors.index.json": read_checkpoint,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to nowhere"])
def test_what_is_no_file_is_not_waited_for(name, kind, tmp_path):
    path = tmp_path / name
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            path.symlink_to("nowhere")
    refusal(READERS[name], path)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "ids.txt", "meta.json", "vocab.txt"])
def test_a_pipe_in_a_corpus_is_not_waited_for(name, toy_world, tmp_path):
    folder = copy(toy_world / "corpus", tmp_path / "corpus")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=name if name != "vocab.txt" else "corpus"):
        Corpus.open(folder).document_id(0)


@pytest.mark.parametrize("name", [name for name in READERS if not name.endswith("n.bin")])
def test_a_file_of_a_terabyte_is_not_read(name, tmp_path):
    with open(tmp_path / name, "wb") as file:
        file.write((1 << 39).to_bytes(8, "little") + b'{"')
        file.truncate(1 << 40)  # it takes no room on the disk
    refusal(READERS[name], tmp_path / name)


# JSON.


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' stands twice"),
        (b'{"a": ' + b"9" * 10_000_000 + b"}", "not readable"),
        (b"\xef\xbb\xbf{}", "not readable"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": 1}\x00', "not readable"),
        (b'"text"', "expected a JSON object"),
    ],
)
def test_json(content, complaint, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    assert complaint in refusal(read_json, tmp_path / "config.json")


@pytest.mark.parametrize(
    "content",
    [
        '"hidden_act": ' + "[" * 985 + "]" * 985,  # as deep as can be read: is it told as well?
        '"hidden_act": "' + "a" * 10_000_000 + '"',
        '"hidden_size": ' + "9" * 4300,
        '"hidden_size": 1e400',
        '"hidden_size": "\\ud800"',
        '"layer_norm_eps": NaN',
        '"layer_norm_eps": -Infinity',
        '"layer_norm_eps": ' + "9" * 4300,
    ],
)
def test_what_a_config_says_is_told_in_brief(content, tmp_path):
    text = json.dumps(TOY_CONFIG.to_dict())
    key = content.split('"')[1]
    text = json.dumps({k: v for k, v in TOY_CONFIG.to_dict().items() if k != key})
    (tmp_path / "config.json").write_text(text[:-1] + ", " + content + "}")
    refusal(BertConfig.read, tmp_path / "config.json")


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 9_999_999},
        {"hidden_size": 30_000, "intermediate_size": 30_000},
        {"intermediate_size": 10_000_000, "hidden_size": 768},
        {"vocab_size": 10_000_000, "hidden_size": 768},
        {"max_position_embeddings": 10_000_000, "hidden_size": 768},
        {"type_vocab_size": 10_000_000, "hidden_size": 768},
        {"num_hidden_layers": 10_000_000, "hidden_size": 3, "intermediate_size": 1},
        {"num_hidden_layers": 1_001, "hidden_size": 3, "intermediate_size": 1},
        {"num_hidden_layers": 2**63},
        {"vocab_size": 2_000_000_000},
    ],
)
def test_sizes_that_would_take_all_memory(sizes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TOY_CONFIG.to_dict() | sizes))
    refusal(BertConfig.read, tmp_path / "config.json")


# safetensors.

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def safetensors(header: Any, data: bytes = b"1234") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        (0).to_bytes(8, "little"),
        (3).to_bytes(8, "little") + b"{}",
        safetensors(b'{"a":' * 100_000),
        safetensors(b'{"\xff": 1}'),
        safetensors(b'{"\\ud800": ' + json.dumps(ONE).encode() + b"}"),
        safetensors(b'{"a": %s, "a": %s}' % ((json.dumps(ONE).encode(),) * 2)),
        safetensors({"\x1b[2J": ONE}),  # would clear the screen that complains of it
        safetensors({"a": ONE, "b": ONE}),
        safetensors({"a": ONE | {"data_offsets": [0, 8]}}),
        safetensors({"a": ONE | {"data_offsets": [4, 0]}}),
        safetensors({"a": ONE | {"data_offsets": [-4, 0]}}),
        safetensors({"a": ONE}, b"12345678"),
        safetensors({"a": ONE | {"shape": [2]}}),
        safetensors({"a": ONE | {"shape": [2**62]}}),
        safetensors({"a": ONE | {"shape": [2**32, 2**32]}}, b""),
        safetensors({"a": ONE | {"shape": [0, 2**63], "data_offsets": [0, 0]}}, b""),
        safetensors({"a": ONE | {"dtype": "F31"}}),
        safetensors({"a": ONE, "__metadata__": {"a": {"b": 1}}}),
        safetensors([ONE]),
        safetensors({f"{n}": ONE | {"shape": [0], "data_offsets": [0, 0]} for n in range(70_000)}),
    ],
)
def test_a_safetensors_file_that_lies(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "not a whole safetensors file" in refusal(read_tensors, tmp_path / "model.safetensors")


def toy_folder(toy_world: Path, folder: Path, change: Callable[[dict], None]) -> Path:
    """The toy teacher with some of its tensors changed."""
    copy(toy_world / "teacher", folder)
    tensors, _ = read_tensors(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    convert_weights.fill_folder(folder, tensors, TOY_CONFIG, torch.nn.Module, toy_world)
    return folder


def copy(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_no_floats(dtype, toy_world, tmp_path):
    """`.to(float32)` would make numbers of them."""
    name = "layers.1.query.bias"

    def change(tensors):
        tensors[name] = torch.ones(24).to(dtype)

    folder = toy_folder(toy_world, tmp_path / "model", change)
    for read in load_model, lambda folder: convert_weights.to_hugging_face(folder, tmp_path / "hf"):
        with pytest.raises(InputError, match=rf"model.safetensors: {name} is .*expected floats"):
            read(folder)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("number", "dtype"), [(float("nan"), torch.float32), (-1e300, torch.float64)]
)
def test_weights_that_nothing_can_be_computed_with(number, dtype, toy_world, tmp_path):
    """Refused by who computes with them. A conversion, which keeps every bit, keeps these too."""
    name = "layers.1.query.bias"

    def change(tensors):
        tensors[name] = tensors[name].to(dtype)
        tensors[name][7] = number

    folder = toy_folder(toy_world, tmp_path / "model", change)
    with pytest.raises(InputError, match=f"model.safetensors: {name} holds NaN or numbers beyond"):
        load_model(folder)
    convert_weights.to_hugging_face(folder, tmp_path / "hf")


# torch.save.


class Code:
    """Unpickling it would leave a file behind."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def numbers() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(10.0), "b": torch.ones(5, 7)}


def saved(content: Any, zipped: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def rezipped(
    content: bytes, change: Callable[[str, bytes], bytes], kind: int = zipfile.ZIP_STORED
) -> bytes:
    """A `torch.save` archive whose members `change` has changed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", kind) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return out.getvalue()


def with_pickle(before: bytes, after: bytes) -> bytes:
    """The archive of `numbers()` with the last place in its pickle that matches replaced."""

    def change(name: str, member: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return member
        place = list(re.finditer(before, member, re.DOTALL))[-1]
        return member[: place.start()] + after + member[place.end() :]

    return rezipped(saved(numbers()), change)


def test_a_pickle_is_never_run(tmp_path):
    proof = tmp_path / "proof"
    code = numbers() | {"code": Code(proof)}
    (tmp_path / "zip.bin").write_bytes(saved(code))
    (tmp_path / "legacy.bin").write_bytes(saved(code, zipped=False))
    (tmp_path / "protocol0.bin").write_bytes(pickle.dumps(Code(proof), protocol=0))
    begin = saved(numbers(), zipped=False)
    for protocol in (0, 1, 2, 4):  # in the place of the state dict
        call = pickle.dumps(Code(proof), protocol=protocol)
        ends = [place for op, _, place in opcodes_of_all(begin) if op.name == "STOP"]
        content = begin[: ends[2] + 1] + call + begin[ends[3] + 1 :]
        (tmp_path / f"legacy{protocol}.bin").write_bytes(content)
        zipped = rezipped(
            saved(numbers()), lambda name, old, call=call: call if "data.pkl" in name else old
        )
        (tmp_path / f"zip{protocol}.bin").write_bytes(zipped)
    files = list(tmp_path.glob("*.bin"))
    assert len(files) == 11
    for path in files:
        refusal(read_torch_save, path)
    assert "holds code (posix.mkdir)" in refusal(read_torch_save, tmp_path / "zip.bin")
    assert "holds code (posix.mkdir)" in refusal(read_torch_save, tmp_path / "legacy.bin")
    assert not proof.exists()


def opcodes_of_all(content: bytes):
    """The opcodes of the five pickles at the beginning of a legacy file."""
    file = io.BytesIO(content)
    for _ in range(5):
        yield from list(pickletools.genops(file))


def bytes_of_zeros(count: int) -> bytes:
    """An archive of `torch.save` with a storage of `count` zeros, compressed to a thousandth."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        with zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(1)}))) as old:
            [pickle_name] = [name for name in old.namelist() if name.endswith("data.pkl")]
            described = old.read(pickle_name)
        long = b"\x8a\x05" + (count // 4).to_bytes(5, "little")
        archive.writestr(pickle_name, described.replace(b"K\x01tq\x07Q", long + b"tq\x07Q"))
        with archive.open(pickle_name.replace("data.pkl", "data/0"), "w") as member:
            for _ in range(count // 1_000_000):
                member.write(bytes(1_000_000))
    return out.getvalue()


def call(name: bytes, number: int) -> bytes:
    """The opcodes of `name(number)`."""
    return b"c" + name + b"\n\x8a\x05" + number.to_bytes(5, "little") + b"\x85R"


LONG = b"\x8a\x05" + (10**11).to_bytes(5, "little")


@pytest.mark.parametrize(
    "content",
    [
        lambda: bytes_of_zeros(300_000_000),
        lambda: rezipped(saved(numbers()), lambda name, old: old, zipfile.ZIP_DEFLATED),
        lambda: with_pickle(b"K\x05K\x07\x86", LONG + b"K\x07\x86"),  # a shape beyond the storage
        lambda: with_pickle(b"K\x07K\x01\x86", LONG + b"K\x01\x86"),  # strides that leave it
        lambda: with_pickle(b"K\x07K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86"),  # backwards
        lambda: with_pickle(  # a huge tensor of one number
            b"K\x05K\x07\x86q.K\x07K\x01\x86", LONG + LONG + b"\x86K\x00K\x00\x86"
        ),
        lambda: with_pickle(b"Q", b"0" + call(b"__builtin__\nbytearray", 10**11)),
        lambda: with_pickle(b"Q", b"0" + call(b"__builtin__\nlist", 10**11)),
        lambda: with_pickle(b"FloatStorage", b"DoubleStorage"),
        lambda: with_pickle(b"FloatStorage", b"QInt8Storage"),
        lambda: with_pickle(rb"u\.", b"u"),
        lambda: with_pickle(rb"u\.", b"0" * 50 + b"."),
        lambda: with_pickle(rb"u\.", b"(" + b"d" * 50 + b"."),
        lambda: with_pickle(rb"u\.", b"uq\x01(h\x01h\x01u."),  # a dict as its own key
        lambda: with_pickle(rb"u\.", b")" + b"2\x86" * 60 + b"N" + b"s."),  # a key of 2^60 parts
        lambda: saved({"a": torch.ones(3, 3).to_sparse()}),
        lambda: saved({"a": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.quint8)}),
        lambda: saved({"a": torch.ones(3, device="meta")}),
        lambda: saved({"a": np.ones(3)}),
        lambda: saved({("a", "b"): torch.ones(3)}),
        lambda: saved({"\x1b[2J": torch.ones(3)}),
        lambda: saved({"\ud800": torch.ones(3)}),
        lambda: twice_the_same(),
        lambda: saved({f"{n}": torch.ones(3).expand(100, 3) for n in range(100)}),
        lambda: rezipped(saved(numbers()), lambda n, old: old[:-4] if "data/0" in n else old),
        lambda: saved(numbers(), zipped=False)[:-4],
        lambda: lying_legacy(9),
        lambda: lying_legacy(2**63),
        lambda: overlapping(),
        lambda: b"PK\x03\x04" + bytes(100),
    ],
)
def test_a_torch_save_file_that_lies(content, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(content())
    refusal(read_torch_save, tmp_path / "pytorch_model.bin")


def lying_legacy(length: int) -> bytes:
    """A legacy file in which a storage says that it has `length` numbers."""
    content = saved({"a": torch.arange(10.0)}, zipped=False)
    said = b"K\x0aN" if b"K\x0aN" in content else b"K\x0a"
    long = b"\x8a\x09" + length.to_bytes(9, "little")
    content = content.replace(said, long + said[2:], 1)
    return content.replace((10).to_bytes(8, "little"), (length % 2**63).to_bytes(8, "little"))


def overlapping() -> bytes:
    """Forty entries of a central directory for the same hundred kilobytes."""
    content = saved({"a": torch.zeros(25_000)})
    out = io.BytesIO(content)
    with zipfile.ZipFile(out, "a") as archive:
        [big] = [member for member in archive.infolist() if member.filename.endswith("data/0")]
        for number in range(40):
            entry = zipfile.ZipInfo(f"x/data/{number + 1}")
            for field in ("header_offset", "CRC", "compress_size", "file_size", "compress_type"):
                setattr(entry, field, getattr(big, field))
            archive.filelist.append(entry)
            archive.NameToInfo[entry.filename] = entry
        archive._didModify = True
    return out.getvalue()


def twice_the_same() -> bytes:
    """An archive with two members of one name: which of them is meant?"""
    out = io.BytesIO(saved(numbers()))
    with zipfile.ZipFile(out, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        [name] = [name for name in archive.namelist() if name.endswith("data/0")]
        archive.writestr(name, bytes(40))
    return out.getvalue()


def test_tensors_that_share_memory_are_converted_right(toy_world, tmp_path):
    """Parts of one storage, side by side and overlapping: each is written with its own numbers."""
    hf = tmp_path / "hf"
    convert_weights.to_hugging_face(toy_world / "teacher", hf)
    tensors, _ = read_tensors(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    together = torch.arange(200.0)
    names = [f"bert.encoder.layer.{n}.output.dense.bias" for n in range(4)]  # 24 numbers each
    shared = [together[:24], together[24:48], together[40:64], together[100:148:2]]
    tensors |= dict(zip(names, shared, strict=True))
    torch.save(tensors, hf / "pytorch_model.bin")
    convert_weights.from_hugging_face(hf, tmp_path / "out")
    found, _ = read_tensors(tmp_path / "out" / "model.safetensors")
    for n, expected in enumerate(shared):
        assert torch.equal(found[f"layers.{n}.output.bias"], expected)


# Shards.


def test_a_shard_that_is_a_link_is_followed(tmp_path):
    """Hugging Face's own cache is made of links, and who can make one can copy the file as well."""
    (tmp_path / "elsewhere").write_bytes(safetensors({"a": ONE}))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "part.safetensors").symlink_to(tmp_path / "elsewhere")
    index = tmp_path / "folder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    assert read_checkpoint(index)[0]["a"].shape == (1,)


@pytest.mark.parametrize(
    "places",
    [
        {"a": "../part.safetensors"},
        {"a": "/etc/passwd"},
        {"a": ".."},
        {"a": ""},
        {"a": "."},
        {"a": "\x00"},
        {"a": "\ud800"},
        {"a\x1b[2J": "part.safetensors"},
        {"a": "model.safetensors.index.json"},
        {f"{n}": f"{n}.safetensors" for n in range(50_000)},
        {f"{n}": "part.safetensors" for n in range(1_000)},
    ],
)
def test_an_index_that_points_elsewhere(places, tmp_path):
    (tmp_path / "part.safetensors").write_bytes(safetensors({"a": ONE}))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(InputError, match=str(tmp_path)):
        read_checkpoint(index)


# Tokenizers.


def vocabulary(*more: str) -> bytes:
    return "\n".join([*SPECIAL_TOKENS, "a", "b", "##a", *more, ""]).encode()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (vocabulary("b"), "line 9 repeats 'b' of line 7"),
        (vocabulary("x" * 3_000_000, "x" * 3_000_000), "line 10 repeats 'xxx"),
        (vocabulary().replace(b"[MASK]", b"[mask]"), r"no [MASK] in the vocabulary"),
        (vocabulary().replace(b"\n", b"\r\n"), "in the vocabulary; BERT needs each"),
        (vocabulary(*(f"{n:x}" for n in range(1_000_001))), "lines; expected at most 1,000,000"),
        (b"\n" * 10_000_000, "lines; expected at most 1,000,000"),
        (vocabulary() + b"\xff\n", "not UTF-8"),
        (b"\x00" * 1_000_000, "in the vocabulary; BERT needs each"),
    ],
)
def test_a_vocabulary(content, complaint, tmp_path):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(tmp_path / "vocab.txt")
    assert complaint in str(caught.value) and len(str(caught.value)) < 1_000


def tokenizer_json(folder: Path) -> dict:
    (folder / "vocab.txt").write_bytes(vocabulary())
    load_tokenizer(folder / "vocab.txt").backend.save(str(folder / "tokenizer.json"))
    return json.loads((folder / "tokenizer.json").read_text())


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}


def split(pattern: str) -> dict:
    return {
        "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Sequence", "normalizers": [GROWING] * 20}},
        {"normalizer": {"type": "Prepend", "prepend": "a" * 10_000_000}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAA"}},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}]}},
        {"pre_tokenizer": split("(a")},
        {"added_tokens": [ADDED | {"id": 10**9, "content": "c", "special": False}]},
        {"added_tokens": [ADDED | {"id": 5, "content": "c", "special": True}]},
        {"added_tokens": [ADDED | {"id": -1, "content": "c", "special": True}]},
        {"model.vocab.c": 2**31},
        {"model.vocab.c": 1_000_000},
        {"model.vocab.c": -1},
        {"model.vocab.c": 5},
        {"model.vocab.c": 8.5},
        {"model.vocab": {}},
        {"model.vocab": []},
        {"model": {"type": "BPE", "vocab": {"[UNK]": 0}, "merges": []}},
        {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["[UNK]", 0.0]]}},
        {"model": None},
        {"model": "WordPiece"},
        {"normalizer": "BertNormalizer"},
        {"normalizer": {"type": ["Sequence"]}},
    ],
)
def test_a_tokenizer_json(change, tmp_path):
    content = tokenizer_json(tmp_path)
    for path, value in change.items():
        *parents, key = path.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        place[key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    refusal(load_tokenizer, tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": split("(a+)+$")},  # never ends; the library gives up with a panic
        {"model": {"type": "WordLevel", "unk_token": "[GONE]"}},
        {"model": {"type": "WordPiece", "unk_token": "[GONE]"}},
    ],
)
def test_a_tokenizer_that_fails_at_its_work(change, tmp_path, capfd):
    content = tokenizer_json(tmp_path)
    content["model"] |= change.pop("model", {})
    content |= change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json: cannot cut text \("):
        tokenizer.encode_batch(["a" * 40 + "b z"])


def test_a_tokenizer_json_cannot_cut_the_text_short(tmp_path):
    content = tokenizer_json(tmp_path)
    content["truncation"] = {
        "direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    content["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    content["post_processor"] = {
        "type": "TemplateProcessing", "pair": [], "special_tokens": {},
        "single": [{"Sequence": {"id": "B", "type_id": 0}}],  # without the text
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path / "tokenizer.json").encode_batch(["b a b"]) == [[6, 5, 6]]


# A corpus.


def npy(header: str, data: bytes, version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin-1")
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


def archive_of(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, array)
    return out.getvalue()


OFFSETS_FILE = r"offsets\.npy"  # which is at odds with a meta.json that lies
OFFSETS = struct.pack("<44q", *range(44))  # the toy corpus has 43 documents
HEADER = "{'descr': '%s', 'fortran_order': %s, 'shape': %s, }\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("offsets.npy", b""),
        ("offsets.npy", pickle.dumps([1, 2, 3])),
        ("offsets.npy", archive_of(np.arange(44))),
        ("offsets.npy", npy(HEADER % ("|O", False, "(44,)"), OFFSETS)),
        ("offsets.npy", npy(HEADER % (">i8", False, "(44,)"), OFFSETS)),
        ("offsets.npy", npy(HEADER % ("<u8", False, "(44,)"), OFFSETS)),
        ("offsets.npy", npy(HEADER % ("<i8", True, "(44, 1)"), OFFSETS)),
        ("offsets.npy", npy(HEADER % ("<i8", False, "(44,)"), OFFSETS[:-8])),
        ("offsets.npy", npy(HEADER % ("<i8", False, f"({2**60},)"), OFFSETS)),
        ("offsets.npy", npy(HEADER % ("<i8", False, f"({2**63},)"), OFFSETS)),
        ("offsets.npy", npy(HEADER % ("<i8", False, f"({2**70},)"), OFFSETS)),
        ("offsets.npy", npy(HEADER % ("<i8", False, "(-44,)"), OFFSETS)),
        ("offsets.npy", npy("(" * 9_000, OFFSETS)),
        ("offsets.npy", npy(HEADER % ("x" * 9_000, False, "(44,)"), OFFSETS)),
        ("offsets.npy", npy(HEADER % ("<i8", False, "(44,)"), OFFSETS, b"\x09\x00")),
        ("offsets.npy", npy(HEADER % ("<i8", False, "(44,)"), OFFSETS)),  # not these tokens
        ("tokens.bin", b""),
        ("tokens.bin", b"1"),
        ("tokens.bin", b"\xff\xff" * 1_000),
        ("meta.json", b"{}"),
        ("meta.json", {"documents": 10**18}),
        ("meta.json", {"documents": int("9" * 4300)}),
        ("meta.json", {"documents": -1}),
        ("meta.json", {"documents": True}),
        ("meta.json", {"documents": 43.0}),
        ("meta.json", {"held_out_documents": 43}),
        ("meta.json", {"tokens": 2**62}),
        ("meta.json", {"dtype": "uint32"}),
        ("meta.json", {"dtype": "object"}),
        ("meta.json", {"dtype": ["uint16"]}),
        ("meta.json", {"dtype": "x" * 1_000_000}),
        ("meta.json", {"vocabulary_sha256": "0"}),
        ("meta.json", {"format_version": 2}),
        ("vocab.txt", vocabulary()),
    ],
)
def test_a_corpus_that_lies(name, content, toy_world, tmp_path):
    folder = copy(toy_world / "corpus", tmp_path / "corpus")
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / name).read_text()) | content).encode()
    (folder / name).write_bytes(content)
    assert re.search(rf"{name}|{OFFSETS_FILE}", refusal(Corpus.open, folder))


def test_ids_beyond_the_vocabulary_and_ids_that_are_no_text(toy_world, tmp_path):
    folder = copy(toy_world / "corpus", tmp_path / "corpus")
    size = (folder / "tokens.bin").stat().st_size
    (folder / "tokens.bin").write_bytes(b"\x63\x00" * (size // 2))  # 99: one too many
    (folder / "ids.txt").write_bytes(b"\xff\n" * 43)
    corpus = Corpus.open(folder)
    with pytest.raises(InputError, match=r"tokens\.bin: damaged; document 7 holds 99"):
        corpus.tokens(7)
    with pytest.raises(InputError, match=r"ids\.txt: not UTF-8"):
        corpus.document_id(7)
