"""From a corpus to the batch of a step: which documents, which window of each, which tokens masked.

Every choice is a pure function of (seed, epoch, document), and the batch of any step can be built
alone: nothing is remembered from the steps before it. A global batch is sorted by length and cut
into micro-batches of a token budget, so that padding nearly vanishes and what a step learns from
does not change with the budget.

Shapes: B sequences of a micro-batch, S its longest sequence, M its masked positions.
"""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minibert.data.corpus import Corpus
from minibert.errors import InputError

MASKED_SHARE = 0.15  # of the tokens that are no special ones, each independently
REPLACED_BY_MASK = 0.8  # of those: [MASK]; then a random id; the rest stay as they are
REPLACED_BY_RANDOM = 0.1

TRAINING, HELD_OUT = 0, 1  # separate streams of random numbers
HELD_OUT_SEED = 0  # not the run's: runs are evaluated on the same masked positions


class MicroBatch(NamedTuple):
    """What goes through the models at once."""

    input_ids: Tensor  # (B, S) int64, masked and padded
    attention_mask: Tensor  # (B, S) int64, 1 = real, 0 = padding
    masked_positions: Tensor  # (M,) int64, indices into the B * S positions
    labels: Tensor  # (M,) int64, the original ids there

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device; from pinned memory, without waiting for the copy."""
        return MicroBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class GlobalBatch(NamedTuple):
    """What one update learns from, and the counts its losses are divided by."""

    micro_batches: list[MicroBatch]  # of this process alone; all else is of the whole batch
    documents: list[int]  # numbers in the corpus, in the order of the epoch
    num_tokens: int  # real tokens, [CLS] and [SEP] included
    num_masked: int


class Sequence(NamedTuple):
    """One masked sequence, on its way into a batch."""

    input_ids: np.ndarray  # (length,) with [CLS] and [SEP], masked
    original_ids: np.ndarray  # (length,) before masking
    masked: np.ndarray  # (length,) bool: where a label is asked for


class Batches:
    """The batches of a run.

    Args:
        corpus: where the tokens are.
        max_length: tokens of a sequence at most, [CLS] and [SEP] included.
        micro_batch_tokens: tokens of a micro-batch at most, padding included (a single sequence
            may exceed it).
        batch_size: sequences in a global batch.
        seed: of order and masks.
        rank, world_size: of the processes that share each global batch, the one that this is.
    """

    def __init__(
        self,
        corpus: Corpus,
        max_length: int,
        micro_batch_tokens: int = 4096,
        batch_size: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < world_size:
            raise InputError(f"--batch-size {batch_size} for {world_size} processes")
        self.rank, self.world_size = rank, world_size
        self.corpus = corpus
        self.batch_size = batch_size
        self.max_length = max_length
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed
        self.tokenizer = corpus.tokenizer
        self.maskable = np.ones(self.tokenizer.vocab_size, dtype=bool)  # by id
        self.maskable[list(self.tokenizer.special_ids)] = False
        self.random_ids = np.flatnonzero(self.maskable)
        if len(self.random_ids) == 0:
            raise InputError(f"{self.tokenizer.source}: special tokens alone, nothing to mask")

    def at(self, step: int) -> GlobalBatch:
        """The global batch of update `step`, counted from 0."""
        epochs_and_documents = self._epochs_and_documents(step)
        sequences = [
            self._sequence(document, epoch, self.seed, TRAINING)
            for epoch, document in epochs_and_documents
        ]
        own = longest_first(sequences)[self.rank :: self.world_size]
        return GlobalBatch(
            micro_batches=self._micro_batches(own),
            documents=[document for _, document in epochs_and_documents],
            num_tokens=sum(len(sequence.input_ids) for sequence in sequences),
            num_masked=sum(int(sequence.masked.sum()) for sequence in sequences),
        )

    @contextmanager
    def ahead(self, steps: range, pinned: bool) -> Iterator[Iterator[GlobalBatch]]:
        """The global batches of `steps`, built by a process of their own while others are used.

        The process ends with the context. pinned: in memory that a GPU copies from by itself.
        """
        reader, writer = multiprocessing.Pipe(duplex=False)
        worker = multiprocessing.Process(target=_build, args=(self, steps, reader, writer))
        try:
            with without_signals():  # nor in the worker, ever: they are for us to answer
                worker.start()
            writer.close()  # or we would wait for what a worker that is gone had begun to send
            yield self._received(steps, reader, worker, pinned)
        finally:
            reader.close()
            if worker.pid is not None:
                worker.kill()
                worker.join()

    def _received(
        self, steps: range, reader: Connection, worker: multiprocessing.Process, pinned: bool
    ) -> Iterator[GlobalBatch]:
        """What the worker sends as batches of tensors; its errors raised here."""
        for _ in steps:
            try:
                batch = reader.recv()
            except (EOFError, OSError):  # it is gone
                worker.join()
                raise InputError(self._why_it_ended(worker.exitcode)) from None
            if isinstance(batch, Exception):
                raise batch
            tensors = [[torch.from_numpy(array) for array in part] for part in batch.micro_batches]
            if pinned:
                tensors = [[tensor.pin_memory() for tensor in part] for part in tensors]
            yield batch._replace(micro_batches=[MicroBatch(*part) for part in tensors])

    def _why_it_ended(self, exitcode: int) -> str:
        """What is known of a worker that is gone."""
        told = f"{self.corpus.folder}: its reader ended"
        if exitcode >= 0:
            return f"{told} with status {exitcode}"
        name = signal.Signals(-exitcode).name
        causes = {"SIGBUS": "a file was cut short", "SIGKILL": "perhaps memory ran out"}
        return f"{told} by {name}" + (f"; {causes[name]}" if name in causes else "")

    def to_send(self, step: int) -> GlobalBatch | Exception:
        """As `at`, in what goes from process to process.

        Arrays instead of tensors, each of which would take a file descriptor; an error as a value.
        """
        try:
            batch = self.at(step)
        except (InputError, OSError, MemoryError) as error:
            return error
        arrays = [[tensor.numpy() for tensor in part] for part in batch.micro_batches]
        return batch._replace(micro_batches=[MicroBatch(*part) for part in arrays])

    def held_out(self, num_documents: int) -> list[MicroBatch]:
        """Some held-out documents, evenly spread, with masks that depend on `max_length` alone."""
        first, there = self.corpus.num_training, self.corpus.num_held_out
        count = min(num_documents, there)
        documents = [first + turn * there // count for turn in range(count)]
        sequences = [self._sequence(document, 0, HELD_OUT_SEED, HELD_OUT) for document in documents]
        return self._micro_batches(longest_first(sequences))

    def documents(self, step: int) -> list[int]:
        """Which documents update `step` learns from."""
        return [document for _, document in self._epochs_and_documents(step)]

    def _epochs_and_documents(self, step: int) -> list[tuple[int, int]]:
        turns = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._whose_turn(turn) for turn in turns]

    def _whose_turn(self, turn: int) -> tuple[int, int]:
        """(epoch, document) of a turn: every training document has one turn an epoch."""
        epoch, place = divmod(turn, self.corpus.num_training)
        return epoch, int(epoch_order(self.corpus.num_training, self.seed, epoch)[place])

    def _sequence(self, document: int, epoch: int, seed: int, stream: int) -> Sequence:
        """[CLS] window [SEP] of a document, masked by the 80/10/10 rule."""
        tokens = self.corpus.tokens(document)
        start, end = window(len(tokens), self.max_length - 2, turn=epoch + document)
        original_ids = np.empty(end - start + 2, dtype=np.int64)
        original_ids[0], original_ids[-1] = self.tokenizer.cls_id, self.tokenizer.sep_id
        original_ids[1:-1] = tokens[start:end]

        # A counter-based generator: its key and counter name the draw, so nothing is carried over.
        generator = np.random.Generator(
            np.random.Philox(key=[seed, stream], counter=[0, 0, document, epoch])
        )
        chance, kind = generator.random((2, len(original_ids)))
        random_ids = generator.choice(self.random_ids, len(original_ids))
        masked = (chance < MASKED_SHARE) & self.maskable[original_ids]
        by_mask = masked & (kind < REPLACED_BY_MASK)
        by_random = masked & ~by_mask & (kind < REPLACED_BY_MASK + REPLACED_BY_RANDOM)
        input_ids = np.where(by_mask, self.tokenizer.mask_id, original_ids)
        return Sequence(np.where(by_random, random_ids, input_ids), original_ids, masked)

    def _micro_batches(self, sequences: list[Sequence]) -> list[MicroBatch]:
        """Sequences in descending length, cut where the budget is full."""
        micro_batches, first = [], 0
        while first < len(sequences):
            longest = len(sequences[first].input_ids)
            count = max(1, self.micro_batch_tokens // longest)
            micro_batches.append(self._padded(sequences[first : first + count]))
            first += count
        return micro_batches

    def _padded(self, sequences: list[Sequence]) -> MicroBatch:
        """Sequences side by side, padded to the longest."""
        B, S = len(sequences), max(len(sequence.input_ids) for sequence in sequences)
        input_ids = np.full((B, S), self.tokenizer.pad_id, dtype=np.int64)
        original_ids = np.zeros((B, S), dtype=np.int64)
        attention_mask = np.zeros((B, S), dtype=np.int64)
        masked = np.zeros((B, S), dtype=bool)
        for row, sequence in enumerate(sequences):
            length = len(sequence.input_ids)
            input_ids[row, :length] = sequence.input_ids
            original_ids[row, :length] = sequence.original_ids
            attention_mask[row, :length] = 1
            masked[row, :length] = sequence.masked
        masked_positions = np.flatnonzero(masked)  # (M,)
        labels = original_ids.reshape(-1)[masked_positions]  # (M,)
        arrays = (input_ids, attention_mask, masked_positions, labels)
        return MicroBatch(*map(torch.from_numpy, arrays))


def longest_first(sequences: list[Sequence]) -> list[Sequence]:
    """So that a shortage of memory shows at once, and neighbours need little padding."""
    return sorted(sequences, key=lambda sequence: -len(sequence.input_ids))


def _build(batches: Batches, steps: range, reader: Connection, writer: Connection) -> None:
    """The worker: sends one batch after the other, each when the one before has been taken."""
    reader.close()  # so that sending fails, and this ends, where the run is gone
    with suppress(BrokenPipeError):
        for step in steps:
            writer.send(batches.to_send(step))


@contextmanager
def without_signals() -> Iterator[None]:
    """Requests to end wait until the end of this; processes begun here never see them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    requests = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, requests)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@lru_cache(maxsize=2)  # a batch may straddle two epochs
def epoch_order(num_documents: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the documents 0 to num_documents - 1."""
    return np.random.default_rng([seed, epoch]).permutation(num_documents)


def window(num_tokens: int, longest: int, turn: int) -> tuple[int, int]:
    """(start, end) of the part of a document that a sequence shows.

    A document longer than `longest` tokens is seen through evenly spread windows that together
    cover it; they take turns, one an epoch.
    """
    if num_tokens <= longest:
        return 0, num_tokens
    num_windows = -(-num_tokens // longest)
    start = (turn % num_windows) * (num_tokens - longest) // (num_windows - 1)
    return start, start + longest
