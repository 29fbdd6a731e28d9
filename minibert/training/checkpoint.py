"""Checkpoints of a run: `step_000300/` with weights, optimiser moments and the step.

That is the whole state: every random draw is a function of (seed, step), so nothing else is needed
to go on exactly where the run stood.
"""

import re
import shutil
from pathlib import Path

import torch
from torch import nn

from minibert.config import RunConfig
from minibert.errors import InputError
from minibert.files import atomic_folder, read_json, write_json
from minibert.folder import CONFIG, WEIGHTS, read_tensors, write_tensors

KINDS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW remembers of a parameter
MOMENTS, STATE = "optimizer.safetensors", "state.json"


def checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in run_folder.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """How many updates a checkpoint stands for."""
    return int(checkpoint.name.removeprefix("step_"))


def enter_run_folder(run: RunConfig, identity: dict[str, str]) -> None:
    """Make the folder of a new run, or see that a resumed one is still what it was.

    `identity` are the hashes of what the run learns from: a resumed run must find the same. Its
    config.json then tells what it was last started with.
    """
    if run.resume:
        recorded = read_json(run.out / CONFIG).get("identity")
        if recorded != identity:
            known = recorded if isinstance(recorded, dict) else {}
            changed = [name for name in identity if identity[name] != known.get(name)]
            raise InputError(
                f"{run.out}: --resume with another {' and '.join(changed)} than the run began with"
            )
        if run.steps < (done := max(map(step_of, checkpoints(run.out)), default=0)):
            raise InputError(f"{run.out}: {done} updates are done already; --steps is {run.steps}")
    elif run.out.exists() and any(run.out.iterdir()):
        raise InputError(
            f"{run.out} is not empty; --resume goes on with the run in it, or choose another --out"
        )
    run.out.mkdir(parents=True, exist_ok=True)
    write_json(run.out / CONFIG, {"run": run.to_dict(), "identity": identity})


def save_checkpoint(
    run_folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int
) -> None:
    """Write the state after `step` updates, whole or not at all, and remove all but `keep`."""
    weights = dict(model.named_parameters())
    moments = {
        f"{name}.{kind}": tensor
        for name, parameter in model.named_parameters()
        for kind, tensor in optimizer.state[parameter].items()
    }
    with atomic_folder(run_folder / f"step_{step:06d}") as partial:
        write_tensors(partial / WEIGHTS, weights)
        write_tensors(partial / MOMENTS, moments)
        write_json(partial / STATE, {"step": step})
    for old in checkpoints(run_folder)[:-keep]:
        shutil.rmtree(old)


def load_newest(run_folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put the newest checkpoint into model and optimiser; returns how many updates it stands for.

    0, and nothing changed, where there is none. A damaged checkpoint, or another model's, is an
    InputError that names the file.
    """
    if not (saved := checkpoints(run_folder)):
        return 0
    folder = saved[-1]
    step = step_of(folder)
    if read_json(folder / STATE) != {"step": step}:
        raise InputError(f"{folder / STATE}: not the state after step {step}")
    weights, _ = read_tensors(folder / WEIGHTS)
    moments, _ = read_tensors(folder / MOMENTS)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    moment_shapes = {
        f"{name}.{kind}": torch.Size() if kind == "step" else shape
        for name, shape in shapes.items()
        for kind in KINDS
    }
    for path, found, expected in (
        (folder / WEIGHTS, weights, shapes),
        (folder / MOMENTS, moments, moment_shapes),
    ):
        if {name: tensor.shape for name, tensor in found.items()} != expected:
            raise InputError(f"{path}: the tensors are not those of this run's model")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
            optimizer.state[parameter] = {  # fused AdamW counts its steps where the parameter is
                kind: moments[f"{name}.{kind}"].clone().to(parameter.device) for kind in KINDS
            }
    return step
