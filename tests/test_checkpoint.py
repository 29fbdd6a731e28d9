"""A checkpoint gives back what was saved, bit for bit, or is refused in one line."""

import dataclasses

import pytest
import torch
from conftest import TOY_CONFIG

from minibert.errors import InputError
from minibert.model import BertForMaskedLM
from minibert.training.checkpoint import checkpoints, load_newest, save_checkpoint
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
    save_checkpoint(tmp_path, 2, model, optimizer, keep=1)
    other, other_optimizer = trained(updates=0)
    assert load_newest(tmp_path, other, other_optimizer) == 2
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        state, other_state = optimizer.state[ours], other_optimizer.state[theirs]
        assert state.keys() == other_state.keys()
        assert all(torch.equal(state[kind], other_state[kind]) for kind in state)


def test_the_newest_is_taken_and_the_oldest_removed(tmp_path):
    model, optimizer = trained()
    for step in (2, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, model, optimizer, keep=2)
    (tmp_path / "step_000007.partial").mkdir()  # what a kill in the middle leaves
    assert [path.name for path in checkpoints(tmp_path)] == ["step_999999", "step_1000000"]
    assert load_newest(tmp_path, model, optimizer) == 1_000_000


def test_no_checkpoint_is_step_0(tmp_path):
    model, optimizer = trained()
    assert load_newest(tmp_path, model, optimizer) == 0


def test_another_models_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path, 2, *trained(), keep=1)
    wider = dataclasses.replace(TOY_CONFIG, intermediate_size=38)
    with pytest.raises(InputError, match="tensors are not those of this run's model"):
        load_newest(tmp_path, *trained(wider))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, name):
    save_checkpoint(tmp_path, 2, *trained(), keep=1)
    path = tmp_path / "step_000002" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=name):
        load_newest(tmp_path, *trained())


@pytest.mark.parametrize("state", ["{}", "[3]", '{"step": 3}', '{"step": "2"}'])
def test_a_state_of_another_step_is_refused(tmp_path, state):
    save_checkpoint(tmp_path, 2, *trained(), keep=1)
    (tmp_path / "step_000002" / "state.json").write_text(state)
    with pytest.raises(InputError, match=r"state\.json"):
        load_newest(tmp_path, *trained())
