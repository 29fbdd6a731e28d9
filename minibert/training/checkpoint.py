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
from minibert.folder import read_tensors, write_tensors

CONFIG = "config.json"  # of the run
WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


def checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in run_folder.glob("step_*") if re.fullmatch(r"step_\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def enter_run_folder(run: RunConfig, identity: dict[str, str]) -> None:
    """Make the folder of a new run, or see that a resumed one is still what it was.

    `identity` are the hashes of what the run learns from: a resumed run must find the same.
    """
    if run.resume:
        recorded = read_json(run.out / CONFIG).get("identity", {})
        for name, value in identity.items():
            if recorded.get(name) != value:
                raise InputError(f"{run.out}: --resume with another {name} than the run began with")
        return
    if run.out.exists() and any(run.out.iterdir()):
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

    0, and nothing changed, where there is none.
    """
    if not (saved := checkpoints(run_folder)):
        return 0
    folder = saved[-1]
    weights, _ = read_tensors(folder / WEIGHTS)
    moments, _ = read_tensors(folder / MOMENTS)
    kinds = ("step", "exp_avg", "exp_avg_sq")
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    wanted_moments = {f"{name}.{kind}" for name in expected for kind in kinds}
    if {name: tensor.shape for name, tensor in weights.items()} != expected:
        raise InputError(f"{folder / WEIGHTS}: the tensors are not those of this run's model")
    if moments.keys() != wanted_moments:
        raise InputError(f"{folder / MOMENTS}: the moments are not those of this run's model")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
            optimizer.state[parameter] = {
                kind: moments[f"{name}.{kind}"].to(parameter.device if kind != "step" else "cpu")
                for kind in kinds
            }
    return read_json(folder / STATE)["step"]
