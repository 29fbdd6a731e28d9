"""What the campaign aims at: good files, a reader of them, and what must hold of all it accepts.

A reader's result must be what the spoilt files say, found out in another way than the reader's: by
a few lines of our own over the bytes.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from campaigns.mutations import spoil
from torch import Tensor

import convert_weights
from minibert.config import LARGEST_SIZE, MOST_LAYERS, MOST_PARAMETERS, BertConfig
from minibert.data.corpus import Corpus
from minibert.data.merge import write_corpus
from minibert.data.tokenizer import load_tokenizer
from minibert.errors import InputError
from minibert.folder import (
    WEIGHTS,
    load_model,
    read_folder,
    save_model,
    tensor_shapes,
    write_tensors,
)
from minibert.model import BertForMaskedLM
from minibert.run_config import RunConfig
from minibert.training import checkpoint
from minibert.training.optimizer import build_optimizer

CONFIG = BertConfig(
    vocab_size=29,
    hidden_size=6,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=7,
    max_position_embeddings=11,
)
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL_TOKENS, *(f"w{n:02}" for n in range(20)), "a", "##b", "中", "."]
TEXTS = ["w01 w19 ab 中. [PAD]", "", "a" * 300, "é\x00\u2028 W01 ()[] 0123456789"]

Files = dict[str, bytes]  # the content of a folder


class Target(NamedTuple):
    """A reader under test."""

    good: list[Files]  # folders of which one is spoilt
    read: Callable[[Path], None]  # raises what the reader raises, and AssertionError
    mend: Callable[[Files, Random], Files] | None = None  # what an attacker would put right again


def spoilt(target: Target, draw: Random) -> Files:
    """One of the good folders, one or two of its files spoilt one to three times."""
    files = dict(draw.choice(target.good))
    for _ in range(draw.choice((1, 1, 1, 2))):
        name = draw.choice(sorted(files))
        for _ in range(draw.choice((1, 1, 2, 3))):
            files[name] = spoil(name, files[name], draw)
    return target.mend(files, draw) if target.mend else files


def make_targets(folder: Path) -> dict[str, Target]:
    """All targets, their good files made in `folder` (a new one) and taken into memory."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    torch.manual_seed(0)
    save_model(folder / "model", BertForMaskedLM(CONFIG), tokenizer_from=folder)
    convert_weights.to_hugging_face(folder / "model", folder / "hf")
    load_tokenizer(folder / "vocab.txt").backend.save(str(folder / "tokenizer.json"))
    documents = [
        (f"id {document}", [(5 + document * k) % 24 for k in range(document + 1)])
        for document in range(11)
    ]
    write_corpus(folder / "corpus", load_tokenizer(folder), documents, held_out=0.3)
    as_json = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    model, config = _content(folder / "model"), (folder / "model" / "config.json").read_bytes()
    vocabulary = {"vocab.txt": (folder / "vocab.txt").read_bytes()}
    run = RunConfig(teacher=Path("teacher"), data=Path("corpus"), out=Path("run")).resolved()
    run_config = json.dumps({"run": run.to_dict(), "identity": {"corpus": "0"}}).encode()
    return {
        "converter": Target(list(_checkpoints(folder / "hf")), read_converted),
        "converter --to-hf": Target([model], read_converted_back),
        "config": Target([{"config.json": config}], read_config),
        "tokenizer": Target([vocabulary, as_json], read_tokenizer),
        "model folder": Target([model, model | as_json], read_model),
        "corpus": Target([_content(folder / "corpus")], read_corpus),
        "run config": Target([{"config.json": run_config}], read_run_config),
        "checkpoint": Target([_checkpoint(folder / "run")], read_checkpoint, hashes_put_right),
    }


def _content(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _checkpoints(folder: Path) -> Iterator[Files]:
    """One Hugging Face checkpoint in the ways it can be stored."""
    whole = _content(folder)
    yield dict(whole)
    tensors = read_safetensors(whole.pop("model.safetensors"))
    names = sorted(tensors)
    places = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    shards = {}
    for shard in sorted(set(places.values())):
        part = {name: tensors[name] for name in names if places[name] == shard}
        write_tensors(folder / WEIGHTS, part)
        shards[shard] = (folder / WEIGHTS).read_bytes()
    index = {"model.safetensors.index.json": json.dumps({"weight_map": places}).encode()}
    yield whole | shards | index
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]  # tied: one storage
    some = next(iter(tensors))
    tensors[some] = torch.nn.Parameter(tensors[some])
    for zipped in (True, False):
        torch.save(tensors, folder / "x.bin", _use_new_zipfile_serialization=zipped)
        yield whole | {"pytorch_model.bin": (folder / "x.bin").read_bytes()}


def _checkpoint(run_folder: Path) -> Files:
    """A checkpoint of a run after three updates."""
    model, optimizer = model_and_optimizer()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        optimizer.step()
    run_folder.mkdir()
    checkpoint.save_checkpoint(run_folder, checkpoint.State(3), model, optimizer, keep=1)
    return _content(run_folder / "step_000003")


def model_and_optimizer() -> tuple[BertForMaskedLM, torch.optim.Optimizer]:
    """A seeded model and an optimiser that remembers nothing yet."""
    torch.manual_seed(1)
    model = BertForMaskedLM(CONFIG)
    return model, build_optimizer(model, weight_decay=0.1)


def read_safetensors(content: bytes) -> dict[str, Tensor]:
    """The floats of a file that the reader has accepted."""
    kinds = {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    }  # fmt: skip
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] in kinds:
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            numbers = torch.frombuffer(bytearray(content[begin:end]), dtype=kinds[entry["dtype"]])
            tensors[name] = numbers.view(entry["shape"])
    return tensors


def fingerprint(tensor: Tensor) -> tuple:
    """What two equal tensors have in common: dtype, shape, bytes."""
    return str(tensor.dtype), tuple(tensor.shape), bytes_of(tensor)


def bytes_of(tensor: Tensor) -> bytes:
    """Its numbers as they lie in memory."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def values_stand_in(tensor: Tensor, content: bytes) -> bool:
    """Whether each number of a tensor stands somewhere in a file, at any byte."""
    width = tensor.element_size()
    kind = {2: np.uint16, 4: np.uint32, 8: np.uint64}[width]
    wanted = np.frombuffer(bytes_of(tensor), kind)
    there = [
        np.frombuffer(content[shift : shift + (len(content) - shift) // width * width], kind)
        for shift in range(width)
    ]
    return bool(np.isin(wanted, np.concatenate(there)).all())


def check_converted(source: Path, out: Path) -> None:
    """A converted folder holds the numbers of the source, in the shapes that its config names."""
    found = read_folder(out) if (out / "model.safetensors").exists() else None
    assert found is not None, "nothing was written"
    assert found.config == BertConfig.read(source / "config.json")
    binary = source / "pytorch_model.bin"
    if list(source.glob("*.safetensors")):
        there = {
            fingerprint(tensor)
            for path in source.glob("*.safetensors")
            for tensor in read_safetensors(path.read_bytes()).values()
        }
        assert all(fingerprint(tensor) in there for tensor in found.tensors.values())
    else:
        content = binary.read_bytes()
        assert all(values_stand_in(tensor, content) for tensor in found.tensors.values())


def read_converted(folder: Path) -> None:
    """convert_weights.py: a folder of Hugging Face's to one of ours."""
    out = folder.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    try:
        convert_weights.from_hugging_face(folder, out)
    except (InputError, OSError):
        assert not out.exists(), "something was written all the same"
        assert not out.with_name("out.partial").exists(), "something was left behind"
        raise
    check_converted(folder, out)


def read_converted_back(folder: Path) -> None:
    """convert_weights.py --to-hf: a folder of ours to one of Hugging Face's."""
    out = folder.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    convert_weights.to_hugging_face(folder, out)
    theirs = read_safetensors((out / "model.safetensors").read_bytes())
    ours = read_safetensors((folder / "model.safetensors").read_bytes())
    assert sorted(map(fingerprint, theirs.values())) == sorted(map(fingerprint, ours.values()))


def read_config(folder: Path) -> None:
    """BertConfig.read: what the file says, within what can be built."""
    config = BertConfig.read(folder / "config.json")
    said = json.loads((folder / "config.json").read_bytes())
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        assert value == said.get(entry.name, entry.default)
        if entry.type is int:
            assert type(value) is int and 1 <= value <= LARGEST_SIZE
        else:
            assert 0 <= value < 1
    assert config.num_hidden_layers <= MOST_LAYERS
    assert config.num_parameters <= MOST_PARAMETERS
    if config.num_hidden_layers <= 3:
        shapes = tensor_shapes(BertForMaskedLM, config)
        assert sum(map(math.prod, shapes.values())) == config.num_parameters


def read_tokenizer(folder: Path) -> None:
    """load_tokenizer: special ids that differ, and every id that comes out is in the vocabulary."""
    tokenizer = load_tokenizer(folder)
    assert len(set(tokenizer.special_ids)) == 5
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in tokenizer.special_ids)
    names = [tokenizer.backend.id_to_token(token_id) for token_id in tokenizer.special_ids]
    assert names == SPECIAL_TOKENS
    for ids in tokenizer.encode_batch(TEXTS):
        assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)
    if tokenizer.source.name == "vocab.txt":
        lines = tokenizer.source.read_bytes().decode().removesuffix("\n").split("\n")
        assert tokenizer.vocab_size == len(lines)
        assert all(tokenizer.backend.token_to_id(line) == row for row, line in enumerate(lines))


def read_model(folder: Path) -> None:
    """load_model: finite float32 weights, those of the file."""
    model = load_model(folder)
    assert model.config == BertConfig.read(folder / "config.json")
    there = read_safetensors((folder / "model.safetensors").read_bytes())
    weights = model.state_dict()
    assert weights.keys() == there.keys()
    for name, weight in weights.items():
        assert weight.dtype == torch.float32 and weight.isfinite().all()
        assert torch.equal(weight, there[name].float())
    load_tokenizer(folder).encode_batch(TEXTS)


def read_corpus(folder: Path) -> None:
    """Corpus.open and every document: as many as it says, end to end what tokens.bin holds."""
    corpus = Corpus.open(folder)
    documents = corpus.num_training + corpus.num_held_out
    assert corpus.num_training > 0 and corpus.num_held_out >= 0
    tokens = [corpus.tokens(document) for document in range(documents)]
    assert all(len(part) > 0 for part in tokens)
    assert max(map(max, tokens)) < corpus.tokenizer.vocab_size
    content = (folder / "tokens.bin").read_bytes()
    assert b"".join(part.tobytes() for part in tokens) == content
    lines = (folder / "ids.txt").read_bytes().split(b"\n")
    ids = corpus.document_ids(range(documents))
    assert [name.encode() for name in ids] == lines[:documents]


def read_run_config(folder: Path) -> None:
    """RunConfig.read: every setting of its type and within its range."""
    run = RunConfig.read(folder / "config.json")
    for entry in dataclasses.fields(run):
        value, choices = getattr(run, entry.name), entry.metadata.get("choices")
        assert choices is None or value in choices
        assert value is not None or entry.default is None, entry.name
        if entry.metadata.get("action") == "store_true":
            assert type(value) is bool, entry.name
        if type(value) in (int, float):
            assert math.isfinite(value) and 0 <= value < 2**63, entry.name
    # What was read can be written again, and its folders can be looked for.
    json.dumps(run.to_dict())
    for path in (run.teacher, run.model, run.data, run.out):
        _ = path is not None and path.exists()
    with contextlib.suppress(InputError):  # flags that do not go together
        run.resolved()


def read_checkpoint(folder: Path) -> None:
    """checkpoint.read_checkpoint: all of the file, or model and optimiser stay as they were."""
    step = folder.with_name("step_000003")
    shutil.rmtree(step, ignore_errors=True)
    folder.rename(step)
    model, optimizer = model_and_optimizer()
    before = [parameter.clone() for parameter in model.parameters()]
    try:
        state = checkpoint.read_checkpoint(step, model, optimizer)
    except (InputError, OSError):
        after = model.parameters()
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        assert not optimizer.state
        raise
    assert state.step == 3
    weights = read_safetensors((step / checkpoint.WEIGHTS).read_bytes())
    moments = read_safetensors((step / checkpoint.MOMENTS).read_bytes())
    for name, parameter in model.named_parameters():
        assert fingerprint(parameter.detach()) == fingerprint(weights[name])
        for kind, moment in optimizer.state[parameter].items():
            assert fingerprint(moment) == fingerprint(moments[f"{name}.{kind}"])


def hashes_put_right(files: Files, draw: Random) -> Files:
    """Half the time state.json names the spoilt files' own hashes, so that they are looked into."""
    try:
        state = json.loads(files[checkpoint.STATE])
        if draw.random() < 0.5:
            for name in (checkpoint.WEIGHTS, checkpoint.MOMENTS):
                state["sha256"][name] = hashlib.sha256(files[name]).hexdigest()
            files[checkpoint.STATE] = json.dumps(state).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        pass  # state.json itself is spoilt
    return files
