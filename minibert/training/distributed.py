"""Several processes that train one model: what the ranks of a `torchrun` tell each other.

    torchrun --nproc-per-node 8 train.py --teacher MODEL --data CORPUS --out RUN

Every rank holds the whole student, takes its share of each global batch, and adds its gradient to
those of the others (DistributedDataParallel): all take the same update, that of a single process.
Without torchrun there is one rank, and nothing here does anything.
"""

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from minibert.errors import BAD_INPUT_STATUS, InputError, Stopped, in_one_line

Item = TypeVar("Item")

LONGEST_WAIT = timedelta(minutes=10)  # for a rank that is silent; one that has ended shows at once


def rank() -> int:
    """This process's number, from 0; rank 0 writes and tells."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number among those of its machine: its GPU."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def is_restart() -> bool:
    """Whether torchrun starts this again after a rank had ended (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def ranks_joined() -> Iterator[None]:
    """In here the processes that torchrun started know each other.

    Control goes over the CPU (gloo), so that it waits for no GPU; gradients go over NCCL on GPUs.
    A rank that loses touch with another says so in one line: why is told by the other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    number = os.environ["RANK"]
    try:
        store, *place = next(rendezvous("env://", timeout=LONGEST_WAIT))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            timeout=LONGEST_WAIT,
            store=_of_this_attempt(store, *place),
            rank=place[0],
            world_size=place[1],
        )
        yield
        agreed(0)  # none takes leave while another still has something to say
    except (InputError, OSError) as error:
        raise InputError(f"rank {number}: {in_one_line(error)}") from None
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise
        told = in_one_line(error)
        reason = "" if "peer" in told else f" ({told[:300]})"  # the peer says why it ended
        print(f"rank {number} ends, for it lost touch with another{reason}", file=sys.stderr)
        raise Stopped(1) from None
    dist.destroy_process_group()


def _of_this_attempt(store: dist.Store, rank: int, world_size: int) -> dist.Store:
    """A part of the store where no earlier attempt of this torchrun has left anything.

    torchrun keeps one store for all its restarts (torch 2.13), where ranks would find the addresses
    of those that have ended. So rank 0 names the attempt, and confirms to every other that it knows
    the name: the one that it finds at first may be an old one.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", mine)
        for other in range(1, world_size):
            store.set(store.get(f"{mine}/{other}").decode(), "confirmed")  # get waits for it
        return dist.PrefixStore(mine, store)
    latest = time.monotonic() + LONGEST_WAIT.total_seconds()
    while time.monotonic() < latest:
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/{rank}", mine)
        if store.check([mine]):
            return dist.PrefixStore(attempt, store)
        time.sleep(0.1)
    raise dist.DistStoreError("rank 0 is silent")


@contextmanager
def together() -> Iterator[None]:
    """What goes wrong in here on one rank ends every rank, and is told once."""
    problem = None
    try:
        yield
    except (InputError, OSError) as error:
        problem = error
    failed = _from_all(problem is not None)
    if problem is not None and rank() == failed.index(True):
        raise problem
    if any(failed):
        raise Stopped(BAD_INPUT_STATUS)


def from_rank_0(make: Callable[[], Item]) -> Item:
    """What `make` gives on rank 0, on every rank (small things: it travels as a pickle)."""
    item = None
    with together():
        if rank() == 0:
            item = make()
    return _from_all(item)[0]


def same_everywhere(what: dict[str, str]) -> None:
    """Refuse ranks that were given different things, such as a teacher on one machine."""
    with together():
        for number, others in enumerate(_from_all(what)):
            if changed := [name for name in what if others.get(name) != what[name]]:
                raise InputError(f"rank {number} has another {' and '.join(changed)}")


def agreed(*wishes: int) -> list[int]:
    """Of each wish (0: none) the largest that any rank has, at the same update on every rank."""
    votes = torch.tensor(wishes, dtype=torch.int64)
    if dist.is_initialized():
        dist.all_reduce(votes, dist.ReduceOp.MAX)
    return votes.tolist()


def summed(figures: Tensor) -> Tensor:
    """`figures` added up over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(figures)
    return figures


def spread(tensors: Iterator[Tensor]) -> None:
    """Overwrite the tensors of every rank with those of rank 0."""
    for tensor in tensors:
        if dist.is_initialized():
            dist.broadcast(tensor, src=0)


class SharedGradients(DistributedDataParallel):
    """A model whose gradients are averaged over the ranks; otherwise the model itself."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def shared_gradients(model: nn.Module) -> nn.Module:
    """`model`, with its gradients averaged over the ranks where there are several."""
    return SharedGradients(model) if dist.is_initialized() else model


def exchange_at(last: bool, model: nn.Module) -> AbstractContextManager:
    """Gradients that form in here are exchanged at the last micro-batch of an update alone."""
    return nullcontext() if last or not dist.is_initialized() else model.no_sync()


def _from_all(item: Item) -> list[Item]:
    """The item of every rank, in their order."""
    items = [item] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(items, item)
    return items
