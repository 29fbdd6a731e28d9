"""From a corpus to the batch of a step: which documents, which window of each, which tokens masked.

Every choice is a pure function of (seed, epoch, document), and the batch of any step can be built
alone: nothing is remembered from the steps before it, and nothing kept of an epoch's order. A
global batch is sorted by length and cut into micro-batches of a token budget, so that padding
nearly vanishes and what a step learns from does not change with the budget.

Shapes: B sequences of a micro-batch, S its longest sequence, M its masked positions.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minibert.data.corpus import Corpus
from minibert.data.randomness import hashed, permuted
from minibert.errors import InputError
from minibert.ops.plain import IGNORED_LABEL

MASKED_SHARE = 0.15  # of the tokens that are no special ones, each independently
REPLACED_BY_MASK = 0.8  # of those: [MASK]; then a random id; the rest stay as they are
REPLACED_BY_RANDOM = 0.1

TOKEN_STEP, MASKED_STEP = 64, 32  # a packed micro-batch's tokens and labels are multiples

TRAINING, HELD_OUT, ORDER = 0, 1, 2  # separate streams of random numbers
HELD_OUT_SEED = 0  # not the run's: runs are evaluated on the same masked positions


class MicroBatch(NamedTuple):
    """What goes through the models at once."""

    input_ids: Tensor  # (B, S) int64, masked and padded
    attention_mask: Tensor  # (B, S) int64, 0 = padding, 1 = real; packed: the sequence's number
    masked_positions: Tensor  # (M,) int64, indices into the B * S positions
    labels: Tensor  # (M,) int64, the original ids there; packed: -100 where nothing is asked
    position_ids: Tensor | None = None  # (B, S) int64, places in a sequence; None: 0 to S - 1

    def each(self, change: Callable[[Any], Any]) -> "MicroBatch":
        """The same with every tensor changed."""
        return MicroBatch(*(None if tensor is None else change(tensor) for tensor in self))

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device; from pinned memory, without waiting for the copy."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def packed(self) -> "MicroBatch":
        """The same sequences one after the other in a single row, without padding between them: B
        is 1, S their T tokens rounded up.

        Behind the last token stands padding, behind the last masked position some that do not
        count, up to multiples of `TOKEN_STEP` and `MASKED_STEP`. For each new size of a product a
        CPU's library makes a kernel: that takes time, and the kernels that are kept lie scattered
        in the memory that the next update needs.
        """
        input_ids, attention_mask, masked_positions, labels, _ = self.each(Tensor.numpy)
        rows, columns = attention_mask.nonzero()  # (T,) each: of the real tokens
        new_places = attention_mask.cumsum() - 1  # (B * S,): where a token goes to
        packed = MicroBatch(
            input_ids=_filled_up(input_ids[rows, columns], TOKEN_STEP)[None],
            attention_mask=_filled_up(rows + 1, TOKEN_STEP)[None],
            masked_positions=_filled_up(new_places[masked_positions], MASKED_STEP),
            labels=_filled_up(labels, MASKED_STEP, IGNORED_LABEL),
            position_ids=_filled_up(columns, TOKEN_STEP)[None],
        )
        return packed.each(torch.from_numpy)


class GlobalBatch(NamedTuple):
    """What one update learns from, and the counts its losses are divided by."""

    micro_batches: list[MicroBatch]  # of this process alone; all else is of the whole batch
    documents: list[int]  # numbers in the corpus, in the order of the epoch
    num_tokens: int  # real tokens, [CLS] and [SEP] included
    num_masked: int


class Sequences(NamedTuple):
    """Sequences on their way into a batch, the longest first; each array has an entry for each."""

    documents: np.ndarray  # int64
    starts: np.ndarray  # int64: where in the corpus the first token after [CLS] stands
    lengths: np.ndarray  # int64, [CLS] and [SEP] included
    keys: np.ndarray  # uint64: of their random draws

    def some(self, which: np.ndarray | slice) -> "Sequences":
        """Those that an index or a mask names."""
        return Sequences(*(entries[which] for entries in self))


class Batches:
    """The batches of a run.

    Args:
        corpus: where the tokens are.
        max_length: tokens of a sequence at most, [CLS] and [SEP] included.
        micro_batch_tokens: tokens of a micro-batch at most, padding included (a single sequence
            may exceed it, and what a packed one is filled up with).
        batch_size: sequences in a global batch.
        seed: of order and masks.
        rank, world_size: of the processes that share each global batch, the one that this is.
        packed: whether the micro-batches of `at` are (those of `held_out` never are).
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
        packed: bool = False,
    ):
        if batch_size < world_size:
            raise InputError(f"--batch-size {batch_size} for {world_size} processes")
        self.rank, self.world_size = rank, world_size
        self.corpus = corpus
        self.packed = packed
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
        epochs, documents = self._epochs_and_documents(step)
        sequences = self._sequences(documents, epochs, self.seed, TRAINING)
        is_own = np.arange(len(documents)) % self.world_size == self.rank
        own = self._micro_batches(sequences.some(is_own))
        others = self._micro_batches(sequences.some(~is_own))  # for the counts
        return GlobalBatch(
            micro_batches=[each.packed() for each in own] if self.packed else own,
            documents=documents.tolist(),
            num_tokens=int(sequences.lengths.sum()),
            num_masked=sum(len(micro_batch.labels) for micro_batch in own + others),
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
            parts = [part.each(torch.from_numpy) for part in batch.micro_batches]
            if pinned:
                parts = [part.each(Tensor.pin_memory) for part in parts]
            yield batch._replace(micro_batches=parts)

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
        return batch._replace(micro_batches=[p.each(Tensor.numpy) for p in batch.micro_batches])

    def held_out(self, num_documents: int) -> list[MicroBatch]:
        """Some held-out documents, evenly spread, with masks that depend on `max_length` alone."""
        first, there = self.corpus.num_training, self.corpus.num_held_out
        count = min(num_documents, there)
        documents = first + np.arange(count) * there // count
        epochs = np.zeros_like(documents)
        return self._micro_batches(self._sequences(documents, epochs, HELD_OUT_SEED, HELD_OUT))

    def documents(self, step: int) -> list[int]:
        """Which documents update `step` learns from."""
        return self._epochs_and_documents(step)[1].tolist()

    def _epochs_and_documents(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(batch_size,) each: every training document has one turn an epoch."""
        turns = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(turns, self.corpus.num_training)
        key = hashed(self.seed, ORDER, epochs)  # an order for each epoch
        return epochs, permuted(places, self.corpus.num_training, key)

    def _sequences(
        self, documents: np.ndarray, epochs: np.ndarray, seed: int, stream: int
    ) -> Sequences:
        """[CLS] window [SEP] of each document.

        Longest first, so that a shortage of memory shows at once and neighbours need little
        padding.
        """
        offsets = self.corpus.offsets
        begins, ends = offsets[documents], offsets[documents + 1]
        start, end = window(ends - begins, self.max_length - 2, turn=epochs + documents)
        keys = hashed(seed, stream, epochs, documents)
        sequences = Sequences(documents, begins + start, end - start + 2, keys)
        return sequences.some(np.argsort(-sequences.lengths, kind="stable"))

    def _micro_batches(self, sequences: Sequences) -> list[MicroBatch]:
        """Cut where the budget is full."""
        micro_batches, first, lengths = [], 0, sequences.lengths
        while first < len(lengths):
            count = max(1, self.micro_batch_tokens // int(lengths[first]))
            micro_batches.append(self._micro_batch(sequences.some(slice(first, first + count))))
            first += count
        return micro_batches

    def _micro_batch(self, sequences: Sequences) -> MicroBatch:
        """Sequences side by side, masked, and padded to the longest."""
        documents, starts, lengths, keys = sequences
        columns, ends = np.arange(lengths[0]), lengths[:, None] - 1  # (S,), (B, 1)
        # [CLS], [SEP] and padding are written over what is read in their places, the window's ends.
        inside = np.clip(columns - 1, 0, ends - 2)  # (B, S)
        input_ids = self.corpus.tokens_at(starts[:, None] + inside, documents)  # (B, S)
        input_ids[:, 0] = self.tokenizer.cls_id
        input_ids[columns == ends] = self.tokenizer.sep_id
        input_ids[columns > ends] = self.tokenizer.pad_id
        masked_positions, labels = self._mask(input_ids, hashed(keys[:, None], columns))
        attention_mask = (columns <= ends).astype(np.int64)  # (B, S)
        arrays = (input_ids, attention_mask, masked_positions, labels)
        return MicroBatch(*map(torch.from_numpy, arrays))

    def _mask(self, input_ids: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mask ids in place by the 80/10/10 rule; the masked positions and their labels, (M,) each.

        draws: (B, S) uint64. The upper 32 bits of each decide whether and how, the lower ones are
        for the random id.
        """
        ids, draws = input_ids.reshape(-1), draws.reshape(-1)  # views, (B * S,)
        positions = np.flatnonzero(draws < of_all_draws(MASKED_SHARE))
        positions = positions[self.maskable[ids[positions]]]  # (M,)
        labels, draws = ids[positions], draws[positions]  # (M,)
        by_mask = draws < of_all_draws(MASKED_SHARE * REPLACED_BY_MASK)
        changed = draws < of_all_draws(MASKED_SHARE * (REPLACED_BY_MASK + REPLACED_BY_RANDOM))
        random_ids = self.random_ids[((draws % (1 << 32)) * len(self.random_ids)) >> 32]
        replaced = np.where(by_mask, self.tokenizer.mask_id, random_ids)
        ids[positions] = np.where(changed, replaced, labels)
        return positions, labels


def _filled_up(numbers: np.ndarray, step: int, filler: int = 0) -> np.ndarray:
    """(n,) and behind it as many of the filler as make n a multiple of `step`."""
    return np.pad(numbers, (0, -len(numbers) % step), constant_values=filler)


def of_all_draws(share: float) -> int:
    """The bound that this share of uniform 64-bit numbers lies below; told by the upper half."""
    return round(share * 2**32) << 32


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


def window(num_tokens: np.ndarray, longest: int, turn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(start, end) of the part of each document that a sequence shows; for one, plain numbers.

    A document longer than `longest` tokens is seen through evenly spread windows that together
    cover it; they take turns, one an epoch.
    """
    num_windows = np.maximum(-(-num_tokens // longest), 1)
    start = turn % num_windows * (num_tokens - longest) // np.maximum(num_windows - 1, 1)
    return start, start + np.minimum(num_tokens, longest)
