"""Spoilt files are refused cleanly or read for what they say: `campaigns/fuzz.py`, a short run."""

import os

import pytest
from campaigns.fuzz import Target, campaign
from campaigns.targets import make_targets

from minibert.errors import InputError

NAMES = (
    "converter", "converter --to-hf", "config", "tokenizer", "model folder", "corpus",
    "run config", "checkpoint",
)  # fmt: skip


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> dict[str, Target]:
    return make_targets(tmp_path_factory.mktemp("fuzz") / "good")


def test_every_target_is_run(targets):
    assert set(NAMES) == set(targets)


@pytest.mark.parametrize("name", NAMES)
def test_spoilt_files(name, targets):
    """Of each target 200 inputs, which a long campaign has seen as well."""
    counts = campaign(name, targets[name], inputs=200)
    assert counts.failures == {}
    assert counts.inputs == 200
    assert counts.refused > 100 and counts.read > 0


def test_the_campaign_finds_what_is_wrong():
    """Wrong results, tracebacks, crashes and memory: each is a failure of its own input."""

    def read(folder):
        match int((folder / "number").read_bytes()):
            case 0:
                raise InputError(f"{folder}: refused")
            case 1:
                raise InputError("refused, but which file?")
            case 2:
                raise KeyError("a fault of ours")
            case 3:
                raise AssertionError("a wrong result")
            case 4:
                os.abort()
            case 5:
                bytearray(1_100_000_000)
            case 6:
                try:
                    bytearray(10**13)
                except MemoryError:
                    raise InputError(f"{folder}: the memory ran out, by luck") from None

    files = [{"number": b"%d" % number} for number in range(8)]
    counts = campaign("a reader", Target(files, read), inputs=0)
    found = {number: what.split("\n")[-2] if "\n" in what else what
             for number, what in counts.failures.items()}  # fmt: skip
    assert found[-8] == "a good file was refused"
    assert found[-7].startswith("no file is named")
    assert found[-6] == "KeyError: 'a fault of ours'"
    assert found[-5] == "AssertionError: a wrong result"
    assert found[-4] == "ended by signal 6"
    assert "at the peak" in found[-3]
    assert found[-2].startswith("memory ran out")
    assert -1 not in found


def test_a_hang_is_ended(monkeypatch):
    def read(folder):
        while True:
            pass

    monkeypatch.setattr("campaigns.fuzz.SECONDS", 0.5)
    counts = campaign("a reader", Target([{"a": b""}], read), inputs=0)
    assert counts.failures == {-1: "still running after 0.5 s"}
