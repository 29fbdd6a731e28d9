"""A checkpoint gives back what was saved, bit for bit, or is named and passed over."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from conftest import TOY_CONFIG

from minibert.errors import InputError
from minibert.model import BertForMaskedLM
from minibert.training.checkpoint import State, checkpoints, load_newest, save_checkpoint
from minibert.training.optimizer import build_optimizer


def trained(config=TOY_CONFIG, updates: int = 2) -> tuple[BertForMaskedLM, torch.optim.Optimizer]:
    """A model and its optimiser after some updates on random gradients."""
    torch.manual_seed(updates)
    model = BertForMaskedLM(config)
    optimizer = build_optimizer(model, weight_decay=0.1)
    for _ in range(updates):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
    return model, optimizer


def test_what_is_saved_is_loaded(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path, State(2), model, optimizer, keep=1)
    other, other_optimizer = trained(updates=0)
    assert load_newest(tmp_path, other, other_optimizer) == State(2)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        state, other_state = optimizer.state[ours], other_optimizer.state[theirs]
        assert state.keys() == other_state.keys()
        assert all(torch.equal(state[kind], other_state[kind]) for kind in state)


def test_the_newest_is_taken_and_the_oldest_removed(tmp_path):
    model, optimizer = trained()
    for step in (2, 999_999, 1_000_000):
        save_checkpoint(tmp_path, State(step), model, optimizer, keep=2)
    (tmp_path / "step_000007.partial").mkdir()  # what a kill in the middle leaves
    assert [path.name for path in checkpoints(tmp_path)] == ["step_999999", "step_1000000"]
    assert load_newest(tmp_path, model, optimizer) == State(1_000_000)


def test_no_checkpoint_is_step_0(tmp_path):
    model, optimizer = trained()
    assert load_newest(tmp_path, model, optimizer) == State()


def test_another_models_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path, State(2), *trained(), keep=1)
    wider = dataclasses.replace(TOY_CONFIG, intermediate_size=38)
    with pytest.raises(InputError, match="tensors are not those of this run's model"):
        load_newest(tmp_path, *trained(wider))


WAYS = ["cut", "flip", "delete"]
FILES = ["model.safetensors", "optimizer.safetensors", "state.json"]


def damage(path: Path, way: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if way == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif way == "flip":
        path.write_bytes(content)
    else:
        path.unlink()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, capsys, name, way):
    good, optimizer = trained(updates=2)
    save_checkpoint(tmp_path, State(2), good, optimizer, keep=2)
    save_checkpoint(tmp_path, State(3), *trained(updates=3), keep=2)
    damage(tmp_path / "step_000003" / name, way)
    model, optimizer = trained(updates=4)
    assert load_newest(tmp_path, model, optimizer) == State(2)
    for ours, theirs in zip(model.parameters(), good.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"passed over: {tmp_path / 'step_000003'}")
    assert complaint.count("\n") == 1
    assert name in complaint
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_000002", "step_000003.damaged"]  # which is not the newest any more


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_without_a_whole_checkpoint_nothing_is_changed(tmp_path, capsys, name, way):
    """It is not for the program to begin again where days of work may be rescued."""
    save_checkpoint(tmp_path, State(2), *trained(), keep=1)
    damage(tmp_path / "step_000002" / name, way)
    model, optimizer = trained(updates=3)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(InputError, match="no checkpoint is whole"):
        load_newest(tmp_path, model, optimizer)
    assert name in capsys.readouterr().err
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["step_000002"]


@pytest.mark.parametrize(
    "changes",
    [{"step": 3}, {"step": "2"}, {"skipped": -1}, {"skipped": None}, {"sha256": []}, {"more": 1}],
    ids=str,
)
def test_a_state_that_is_not_the_steps_is_damage(tmp_path, capsys, changes):
    save_checkpoint(tmp_path, State(2), *trained(), keep=1)
    path = tmp_path / "step_000002" / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match="no checkpoint is whole"):
        load_newest(tmp_path, *trained())
    assert "state.json" in capsys.readouterr().err


def test_how_many_updates_were_passed_over_is_remembered(tmp_path):
    save_checkpoint(tmp_path, State(7, skipped=3), *trained(), keep=1)
    assert load_newest(tmp_path, *trained()) == State(7, 3)
