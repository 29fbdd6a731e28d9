"""BERT's tokenizer, from a `vocab.txt` or a `tokenizer.json`; every id is looked up, none assumed.

A `vocab.txt` is read as BERT's cased WordPiece (google-research/bert, `do_lower_case=False`): clean
the text, set CJK characters apart, split at white space and punctuation, then take the longest
known piece from the left. A `tokenizer.json` is taken as it is, less its truncation, padding and
post-processing, if it is made of parts that BERT's tokenizers are made of.
"""

import hashlib
import reprlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from minibert.errors import InputError
from minibert.files import parse_json, read_bytes, read_text

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt")  # in a folder, the first that exists is used

LARGEST_VOCABULARY = 1_000_000  # ids; BERT has 28,996, the largest of its kind half a million

# The parts that a tokenizer.json may name. None makes text longer again and again (a sequence of
# `Replace` could, without end), and BERT's models need no others: they know words and their pieces.
KNOWN_PARTS = {
    "model": ("WordPiece", "WordLevel"),
    "normalizer": (
        "Sequence", "BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip",
        "StripAccents", "Nmt",
    ),
    "pre_tokenizer": (
        "Sequence", "BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation", "Digits",
        "CharDelimiterSplit", "Split", "UnicodeScripts",
    ),
}  # fmt: skip


class SpecialIds(NamedTuple):
    """The ids of the five tokens that BERT gives a meaning of their own."""

    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int


SPECIAL_TOKENS = {
    "pad_id": "[PAD]",
    "unk_id": "[UNK]",
    "cls_id": "[CLS]",
    "sep_id": "[SEP]",
    "mask_id": "[MASK]",
}


@dataclass(frozen=True)
class Tokenizer:
    """A `tokenizers.Tokenizer` and what else there is to know about its vocabulary."""

    backend: tokenizers.Tokenizer
    source: Path  # the vocab.txt or tokenizer.json it was read from
    vocab_size: int  # largest id + 1: the rows that an embedding table needs
    vocabulary_sha256: str  # of the tokens in the order of their ids, joined by newlines
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int

    @property
    def special_ids(self) -> SpecialIds:
        """The five special ids as one value."""
        return SpecialIds(self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text: nothing added, cut off or padded.

        Text is only text: a "[PAD]" that an author wrote (peripheral artery disease) becomes
        BERT's pieces of its letters, as in google-research/bert, and not the padding token.
        Raises InputError where the tokenizer cannot (its pattern never ends, say).
        """
        with _refusing(f"{self.source}: cannot cut text"):
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """As `encode_batch`, and with the characters of its text that each token stands for."""
        with _refusing(f"{self.source}: cannot cut text"):
            return self.backend.encode_batch(texts, add_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Copy the file that the tokenizer was read from into `folder`, under its standard name."""
        shutil.copyfile(self.source, folder / _standard_name(self.source))


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `vocab.txt`, a `tokenizer.json`, or a folder that holds one (tokenizer.json wins).

    Raises InputError for a file that is neither, or that lacks one of BERT's special tokens.
    """
    source = _find(path)
    if _standard_name(source) == "vocab.txt":
        backend = _wordpiece(_read_vocabulary(source))
    else:
        backend = _read_backend(source)
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None  # nothing is to be added or left out
    backend.encode_special_tokens = True  # encode what looks like a special token as plain text

    ids = backend.get_vocab(with_added_tokens=True)
    if len(set(ids.values())) < len(ids):
        raise InputError(f"{source}: several tokens with one id; expected an id for each")
    missing = [token for token in SPECIAL_TOKENS.values() if token not in ids]
    if missing:
        raise InputError(f"{source}: no {' '.join(missing)} in the vocabulary; BERT needs each")
    vocab_size = max(ids.values()) + 1
    if vocab_size > LARGEST_VOCABULARY:
        raise InputError(f"{source}: an id {vocab_size - 1:,}; at most {LARGEST_VOCABULARY:,} ids")
    tokens = [""] * vocab_size  # an id that no token has counts as an empty token
    for token, token_id in ids.items():
        tokens[token_id] = token
    return Tokenizer(
        backend=backend,
        source=source,
        vocab_size=vocab_size,
        vocabulary_sha256=hashlib.sha256("\n".join(tokens).encode()).hexdigest(),
        **{name: ids[token] for name, token in SPECIAL_TOKENS.items()},
    )


def _find(path: Path) -> Path:
    """The tokenizer file that `path` is or holds."""
    if path.is_dir():
        for name in TOKENIZER_FILES:
            if (path / name).is_file():
                return path / name
        raise InputError(f"{path}: neither {' nor '.join(TOKENIZER_FILES)} in this folder")
    if not path.is_file():
        raise InputError(f"{path}: no such tokenizer file")
    return path


def _standard_name(source: Path) -> str:
    """What a tokenizer file is called in a folder; its suffix tells which of the two it is."""
    names = {Path(name).suffix: name for name in TOKENIZER_FILES}
    if source.suffix not in names:
        raise InputError(f"{source}: expected a vocab.txt or a tokenizer.json")
    return names[source.suffix]


def _read_vocabulary(path: Path) -> dict[str, int]:
    """Token -> id from a file with one token a line; the line number, from 0, is the id."""
    text = read_text(path)
    if not text:
        raise InputError(f"{path}: empty; expected one token a line")
    if (tokens := text.count("\n")) > LARGEST_VOCABULARY:
        raise InputError(
            f"{path}: {tokens:,} lines; expected at most {LARGEST_VOCABULARY:,} tokens"
        )
    vocabulary: dict[str, int] = {}
    # Not splitlines(): U+2028 and its like are tokens of some vocabularies.
    for token_id, token in enumerate(text.removesuffix("\n").split("\n")):
        if token in vocabulary:
            first = vocabulary[token] + 1
            raise InputError(f"{path}: line {token_id + 1} repeats {token[:100]!r} of line {first}")
        vocabulary[token] = token_id
    return vocabulary


def _wordpiece(vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """BERT's cased tokenizer; a word of more than 100 characters is [UNK], as in the original."""
    model = WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=False, lowercase=False
    )
    backend.pre_tokenizer = BertPreTokenizer()
    return backend


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    """A `tokenizer.json`, read by the library that wrote it, after a look at what it is made of."""
    text = read_bytes(path)
    with _refusing(f"{path}: not a readable tokenizer.json"):
        content = parse_json(text)
        _check_parts(content)
        backend = tokenizers.Tokenizer.from_buffer(text)
        _check_kind("model", type(backend.model).__name__)  # some old files do not name it
        for token in content.get("added_tokens") or ():
            if backend.token_to_id(token["content"]) != token["id"]:
                raise ValueError(f"added token {token['content']!r} has another id")
    return backend


def _check_parts(content: Any) -> None:
    """Refuse, as a ValueError, a tokenizer of other parts than KNOWN_PARTS, or of too many."""
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError("it has no model")
    _check_kind("model", content["model"].get("type", "WordPiece"))
    if len(content["model"].get("vocab", ())) > LARGEST_VOCABULARY:
        raise ValueError(f"more than {LARGEST_VOCABULARY:,} tokens")
    for kind in ("normalizer", "pre_tokenizer"):
        waiting = [content[kind]] if content.get(kind) else []
        while waiting:
            part = waiting.pop()
            _check_kind(kind, part["type"])
            waiting += part.get("normalizers", part.get("pretokenizers", ()))


def _check_kind(part: str, name: Any) -> None:
    """Refuse, as a ValueError, a part that is not among the known ones."""
    if name not in KNOWN_PARTS[part]:
        known = ", ".join(KNOWN_PARTS[part])
        raise ValueError(f"{part} is {reprlib.repr(name)}; expected {known}")


@contextmanager
def _refusing(complaint: str) -> Iterator[None]:
    """Whatever goes wrong in the library becomes an InputError.

    It raises nothing specific, and a panic of its Rust code is not even an Exception.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InputError(f"{complaint} ({error})") from None
