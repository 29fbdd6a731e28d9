"""A run folder: one run at a time, and its checkpoints, `step_000300/` and the like.

A checkpoint holds weights, optimiser moments and the step. That is the whole state: every random
draw is a function of (seed, step), so nothing else is needed to go on exactly where the run stood.
Its state.json has the SHA-256 of the other two files; what does not match them is passed over.
"""

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minibert.data.corpus import Corpus
from minibert.errors import InputError, in_one_line
from minibert.files import atomic_folder, locked, read_json, sha256_of_files, write_json
from minibert.folder import CONFIG, WEIGHTS, read_tensors, write_tensors
from minibert.run_config import RunConfig
from minibert.training.distributed import from_rank_0, rank, same_everywhere, spread, together

KINDS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter
MOMENTS, STATE, LOCK = "optimizer.safetensors", "state.json", "lock"


class State(NamedTuple):
    """What a run knows beside its tensors."""

    step: int = 0  # updates done
    skipped: int = 0  # those of them that were passed over, for numbers that are not finite


class Damaged(InputError):
    """A checkpoint that is not as it was written."""


def sources(run: RunConfig, corpus: Corpus) -> dict[str, str]:
    """Hashes of what a run learns from, for `run_folder`."""
    hashes = {"corpus": corpus.corpus_sha256, "vocabulary": corpus.tokenizer.vocabulary_sha256}
    for name, source in (("teacher", run.teacher), ("model", run.model)):
        if source is not None:
            files = [source / CONFIG, source / WEIGHTS] if source.is_dir() else [source]
            hashes[name] = sha256_of_files(*files)
    return hashes


@contextmanager
def run_folder(run: RunConfig, identity: dict[str, str]) -> Iterator[None]:
    """Hold the folder of a run: made where it is new, locked, and still what it was.

    `identity` are the hashes of what the run learns from: a resumed run must find the same, and so
    must every rank. The folder's config.json then tells what the run was last started with.
    """
    same_everywhere(identity)
    with ExitStack() as stack:
        with together():
            if rank() == 0:
                begun = (run.out / CONFIG).exists()
                if begun and not run.resume:
                    raise InputError(
                        f"{run.out} holds a run; --resume goes on with it, or choose another --out"
                    )
                if not begun and _is_strange(run.out):
                    raise InputError(f"{run.out} is not empty and no run; choose another --out")
                run.out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(run.out / LOCK))
                if begun != (run.out / CONFIG).exists():
                    raise InputError(f"{run.out}: another run was here in this very moment")
                if begun:
                    _refuse_another(run, identity)
                for leftover in run.out.glob("step_*.partial"):  # a kill while saving or removing
                    shutil.rmtree(leftover)
                write_json(run.out / CONFIG, {"run": run.to_dict(), "identity": identity})
        yield


def _is_strange(folder: Path) -> bool:
    """Whether a folder holds what no run has put there before its config.json."""
    before = (LOCK, CONFIG + ".partial")
    return folder.exists() and any(path.name not in before for path in folder.iterdir())


def _refuse_another(run: RunConfig, identity: dict[str, str]) -> None:
    """A resumed run learns from what it began with, and is not shorter than it is already."""
    recorded = read_json(run.out / CONFIG).get("identity")
    if recorded != identity:
        known = recorded if isinstance(recorded, dict) else {}
        changed = [name for name in identity if identity[name] != known.get(name)]
        raise InputError(
            f"{run.out}: --resume with another {' and '.join(changed)} than the run began with"
        )
    if run.steps < (done := max(map(step_of, checkpoints(run.out)), default=0)):
        raise InputError(f"{run.out}: {done} updates are done already; --steps is {run.steps}")


def checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in run_folder.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """How many updates a checkpoint stands for."""
    return int(checkpoint.name.removeprefix("step_"))


def save_checkpoint(
    run_folder: Path, state: State, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int
) -> None:
    """Write the state, whole or not at all, and remove all checkpoints but the newest `keep`.

    Rank 0 does; the others wait.
    """
    with together():
        if rank() == 0:
            if not run_folder.is_dir():  # made anew, it could not be gone on with
                raise InputError(f"{run_folder}: gone, with all that was saved")
            _write_checkpoint(run_folder, state, model, optimizer)
            for old in checkpoints(run_folder)[:-keep]:  # half of one is none, whoever looks
                shutil.rmtree(old.rename(old.with_name(old.name + ".partial")))


def _write_checkpoint(
    run_folder: Path, state: State, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    moments = {
        f"{name}.{kind}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state[parameter].items()
    }
    with atomic_folder(run_folder / f"step_{state.step:06d}") as partial:
        write_tensors(partial / WEIGHTS, dict(model.named_parameters()))
        write_tensors(partial / MOMENTS, moments)
        write_json(partial / STATE, state._asdict() | {"sha256": _hashes(partial)})


def _hashes(folder: Path) -> dict[str, str]:
    return {name: sha256_of_files(folder / name) for name in (WEIGHTS, MOMENTS)}


def load_newest(run_folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Put the newest whole checkpoint into model and optimiser, on every rank.

    `State()`, and nothing changed, where there is none. A damaged one is named on standard error,
    set aside as `step_....damaged` and passed over; where no other is left, or where it is another
    model's, that is an InputError.
    """
    state = from_rank_0(lambda: _read_newest(run_folder, model, optimizer))
    if state.step > 0:
        spread(_tensors(model, optimizer))
    return state


def _read_newest(run_folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    damaged = []
    for folder in reversed(checkpoints(run_folder)):
        try:
            state = read_checkpoint(folder, model, optimizer)
        except Damaged as error:
            print(f"passed over: {error}", file=sys.stderr)
            damaged.append(folder)
            continue
        for folder in damaged:  # else it would count as the newest
            aside = folder.with_name(folder.name + ".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        return state
    if damaged:
        raise InputError(
            f"{run_folder}: no checkpoint is whole; without its step_* the run begins again"
        )
    return State()


def read_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Put a checkpoint into model and optimiser, or change neither.

    Damage raises `Damaged`, another model's checkpoint an InputError; both name the file.
    """
    state = _read_state(folder)
    weights, moments = (_read(folder / name) for name in (WEIGHTS, MOMENTS))
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    moment_shapes = {
        f"{name}.{kind}": torch.Size() if kind == "step" else shape
        for name, shape in shapes.items()
        for kind in KINDS
    }
    for name, found, expected in (WEIGHTS, weights, shapes), (MOMENTS, moments, moment_shapes):
        fitting = {key: t.shape for key, t in found.items() if t.dtype == torch.float32}
        if fitting != expected or len(found) != len(expected):
            raise InputError(f"{folder / name}: the tensors are not those of this run's model")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
            optimizer.state[parameter] = {  # fused AdamW counts its steps where the parameter is
                kind: moments[f"{name}.{kind}"].clone().to(parameter.device) for kind in KINDS
            }
    return state


def _read_state(folder: Path) -> State:
    """The state.json of a checkpoint whose other files have the hashes that it names."""
    path = folder / STATE
    try:
        content = read_json(path)
        hashes = _hashes(folder)
    except (InputError, FileNotFoundError) as error:  # a disk that fails may be well again
        raise Damaged(in_one_line(error)) from None
    expected_keys = {*State._fields, "sha256"}
    if content.keys() != expected_keys or not isinstance(content["sha256"], dict):
        raise Damaged(f"{path}: expected {', '.join(sorted(expected_keys))}")
    if changed := [name for name in hashes if hashes[name] != content["sha256"].get(name)]:
        raise Damaged(f"{folder / changed[0]}: not as it was written (SHA-256 of {STATE})")
    state = State(*(content[field] for field in State._fields))
    if state.step != step_of(folder) or not _is_count(state.skipped):
        raise Damaged(f"{path}: not the state after step {step_of(folder)}")
    return state


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of one of a checkpoint's files."""
    try:
        return read_tensors(path)[0]
    except (InputError, FileNotFoundError) as error:
        raise Damaged(in_one_line(error)) from None


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Every tensor of the state, in one order on all ranks; zeros where there was none yet."""
    for parameter in model.parameters():
        yield parameter.data
        memory = optimizer.state[parameter]
        for kind in KINDS:
            shape = () if kind == "step" else parameter.shape
            memory.setdefault(kind, torch.zeros(shape, device=parameter.device))
            yield memory[kind]
