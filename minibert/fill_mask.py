"""Which words would stand at [MASK]: the likeliest ones, with their probabilities.

    python -m minibert.fill_mask MODEL "The patient was treated with [MASK]."
    python -m minibert.fill_mask MODEL --json < sentences.txt > words.jsonl

MODEL is a model folder of ours or of Hugging Face. Each text needs a [MASK]; nothing else in it has
a special meaning. Of several masks each is filled by itself, while the others stay masks. Where a
text is longer than the model has positions, each of its masks is filled from as much of the text
around it as fits: the mask stands in the middle, or nearer to an end that the text has there.

Shapes: B windows of a batch, S the longest of them, H hidden, V vocabulary, M masks, k guesses.
"""

import json
import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minibert import Pretrained, load
from minibert.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from minibert.errors import ArgumentParser, InputError, run_command
from minibert.flags import number
from minibert.model import BertForMaskedLM
from minibert.progress import ProgressLine
from minibert.training.device import set_up_device

MASK = SPECIAL_TOKENS["mask_id"]
LINES_AT_ONCE = 128  # among which those of like length are computed side by side
WINDOWS_AT_ONCE = 512  # in memory, however many masks a long line holds
BATCH_TOKENS = 2048  # padding included
MASKS_AT_ONCE = 256  # in memory with the whole vocabulary


class Guess(NamedTuple):
    """A word for a mask, or a piece of one: `##s`, as the vocabulary has it."""

    token: str
    probability: float


class Window(NamedTuple):
    """What the model sees of a text at once: all of it, or what is around one mask."""

    text: int  # the number of the text
    first_mask: int  # the number, within the text, of the first mask to fill in
    input_ids: list[int]  # with [CLS] and [SEP]
    places: list[int]  # of the masks to fill in, in `input_ids`


@torch.inference_mode()
def fill_masks(
    model: BertForMaskedLM, tokenizer: Tokenizer, texts: Sequence[str], top: int = 5
) -> list[list[list[Guess]]]:
    """For each text, for each [MASK] in it: the `top` likeliest words, likeliest first.

    model: on any device, in eval mode (as `minibert.load` gives it). A text without [MASK] gets an
    empty list. Raises InputError where the tokenizer cannot cut a text.
    """
    parts = [text.split(MASK) for text in texts]
    guesses: list[list[list[Guess]]] = [[[]] * (len(part) - 1) for part in parts]
    windows = _windows(tokenizer, parts, model.config.max_position_embeddings)
    while some := list(islice(windows, WINDOWS_AT_ONCE)):
        for batch in _batches(some):
            filled = iter(_fill(model, tokenizer, batch, top))
            for window in batch:
                end = window.first_mask + len(window.places)
                guesses[window.text][window.first_mask : end] = islice(filled, len(window.places))
    return guesses


def _windows(tokenizer: Tokenizer, parts: list[list[str]], positions: int) -> Iterator[Window]:
    """What is seen of texts, each given as the parts between its masks."""
    room = positions - 2  # beside [CLS] and [SEP]
    if room < 1:
        raise InputError(f"the model has {positions} positions; [CLS] {MASK} [SEP] are 3")
    encoded = iter(tokenizer.encode_batch([part for text in parts for part in text]))
    for number_of_text, text in enumerate(parts):
        ids, masks = list(next(encoded)), []
        for part in islice(encoded, len(text) - 1):
            masks.append(len(ids))
            ids += [tokenizer.mask_id, *part]
        together = max(1, len(masks)) if len(ids) <= room else 1
        for first in range(0, len(masks), together):
            start = max(0, min(masks[first] - room // 2, len(ids) - room))
            input_ids = [tokenizer.cls_id, *ids[start : start + room], tokenizer.sep_id]
            places = [mask - start + 1 for mask in masks[first : first + together]]
            yield Window(number_of_text, first, input_ids, places)


def _batches(windows: list[Window]) -> Iterator[list[Window]]:
    """Windows of like length together, longest first, BATCH_TOKENS at most (or one window)."""
    windows = sorted(windows, key=lambda window: -len(window.input_ids))
    while windows:
        count = max(1, BATCH_TOKENS // len(windows[0].input_ids))
        yield windows[:count]
        windows = windows[count:]


def _fill(
    model: BertForMaskedLM, tokenizer: Tokenizer, windows: list[Window], top: int
) -> list[list[Guess]]:
    """The likeliest words for the masks of all windows, one after the other."""
    B, S = len(windows), max(len(window.input_ids) for window in windows)
    input_ids = torch.full((B, S), tokenizer.pad_id)
    attention_mask = torch.zeros(B, S, dtype=torch.long)
    for row, window in enumerate(windows):
        length = len(window.input_ids)
        input_ids[row, :length] = torch.tensor(window.input_ids)
        attention_mask[row, :length] = 1
    places = [S * row + place for row, window in enumerate(windows) for place in window.places]

    device = model.decoder.device
    output = model(
        input_ids.to(device),
        attention_mask.to(device),
        masked_positions=torch.tensor(places, device=device),  # (M,)
    )
    guesses = []
    for head_output in output.head_output.split(MASKS_AT_ONCE):  # (M, H)
        probabilities = model.logits(head_output).softmax(dim=-1)  # (M, V)
        likeliest = probabilities.topk(min(top, probabilities.shape[-1]))  # (M, k)
        guesses += _in_words(tokenizer, likeliest.indices, likeliest.values)
    return guesses


def _in_words(tokenizer: Tokenizer, ids: Tensor, probabilities: Tensor) -> list[list[Guess]]:
    """ids, probabilities (M, k); an id that is no token's is shown as `[id 17]`."""
    word = tokenizer.backend.id_to_token
    return [
        [
            Guess(word(token_id) or f"[id {token_id}]", probability)
            for token_id, probability in zip(*row, strict=True)
        ]
        for row in zip(ids.tolist(), probabilities.tolist(), strict=True)
    ]


def load_for_filling(folder: Path) -> Pretrained:
    """As `minibert.load`; a model without the head that knows words is an InputError."""
    pretrained = load(folder)
    if not isinstance(pretrained.model, BertForMaskedLM):
        raise InputError(f"{folder}: an encoder without the masked-language-modelling head")
    return pretrained


def texts_asked(arguments: Sequence[str]) -> Iterator[list[str]]:
    """The texts to fill in, some at once: the arguments, or the lines of standard input.

    Raises InputError at a text that has no [MASK] or is not UTF-8, when those before it are given.
    """
    at_once = LINES_AT_ONCE
    if arguments and arguments != ["-"]:
        named = ((f"text {n}", os.fsencode(text)) for n, text in enumerate(arguments, start=1))
    else:
        if sys.stdin is None or (sys.stdin.isatty() and not arguments):
            raise InputError("no text; expected one with a [MASK], or lines on standard input")
        if sys.stdin.isatty():
            at_once = 1  # somebody types, and waits for an answer
        lines = enumerate(sys.stdin.buffer, start=1)
        named = ((f"line {n} of standard input", line.rstrip(b"\r\n")) for n, line in lines)
    texts: list[str] = []
    try:
        for name, content in named:
            texts.append(_checked(name, content))
            if len(texts) == at_once:
                yield texts
                texts = []
    except InputError:
        yield texts
        raise
    yield texts


def _checked(name: str, content: bytes) -> str:
    """A text that can be filled in."""
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start})") from None
    if MASK not in text:
        shown = text if len(text) <= 100 else text[:100] + "..."
        raise InputError(f"{name}: no {MASK} in {shown!r}")
    return text


def show(text: str, masks: list[list[Guess]]) -> None:
    """A text and what was found, for people."""
    print(text)
    for count, guesses in enumerate(masks, start=1):
        if len(masks) > 1:
            print(f"{MASK} {count} of {len(masks)}")
        for guess in guesses:
            print(f"  {guess.probability:.4f}  {guess.token}")


def show_json(text: str, masks: list[list[Guess]]) -> None:
    """The same as one JSON object in a line."""
    found = [[guess._asdict() for guess in guesses] for guesses in masks]
    print(json.dumps({"text": text, "masks": found}))


def main() -> None:
    parser = ArgumentParser(
        prog="python -m minibert.fill_mask",
        description=__doc__[: __doc__.index("Shapes:")],
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="a model folder, ours or Hugging Face's"
    )
    parser.add_argument(
        "text",
        metavar="TEXT",
        nargs="*",
        help="a text with a [MASK]; none, or -: every line of standard input is one",
    )
    parser.add_argument(
        "--top", metavar="K", type=number(int, 1), default=5,
        help="words for each mask (default: 5)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object a text")
    flags = parser.parse_args()

    model, tokenizer = load_for_filling(flags.model)
    model.to(set_up_device("auto"))
    line, done = ProgressLine(), 0
    sys.stdout.reconfigure(errors="backslashreplace")  # of a terminal that lacks a letter
    for texts in texts_asked(flags.text):
        found = fill_masks(model, tokenizer, texts, flags.top)
        line.clear()
        for text, masks in zip(texts, found, strict=True):
            (show_json if flags.json else show)(text, masks)
        sys.stdout.flush()
        done += len(texts)
        line.show(f"{done:,} texts")
    line.clear()


if __name__ == "__main__":
    raise SystemExit(run_command(main))
