"""Text files to a corpus folder that `train.py` can learn from.

    python -m minibert.prepare INPUT... --tokenizer vocab.txt --out CORPUS [--held-out 0.05]

INPUT: PubMed's .xml, or .tsv (id, title, abstract), .jsonl ("text"), .txt (a document a line), each
also as .gz. The same input gives the same corpus, byte for byte.
"""

import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minibert.data.corpus import CorpusWriter
from minibert.data.pubmed import Reading, read_documents
from minibert.data.tokenizer import load_tokenizer
from minibert.errors import ArgumentParser, InputError, run_command
from minibert.files import sha256_of_files
from minibert.flags import number
from minibert.progress import ProgressLine, duration

BATCH_CHARACTERS = 1 << 20  # tokenized at once: enough to keep every core busy
MANY_UNKNOWN = 0.02  # share of [UNK]; biomedical text with BioBERT's vocabulary has 0.0001


def prepare(
    inputs: Sequence[Path],
    tokenizer_path: Path,
    out: Path,
    held_out: float = 0.05,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Write the documents of `inputs` as the corpus folder `out` and return its meta.json.

    Args:
        tokenizer_path: a vocab.txt, a tokenizer.json or a folder that holds one.
        held_out: share of the documents kept for evaluation, 0 to below 1.

    Raises InputError for bad input; then, or when interrupted, `out` is not there.
    """
    if not 0 <= held_out < 1:
        raise InputError(f"held-out share {held_out}: expected a number from 0 to below 1")
    if out.name in ("", ".."):
        raise InputError(f"{out}: expected the name of a new folder")
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out} exists already; choose another folder, or delete it first")
    tokenizer = load_tokenizer(tokenizer_path)
    readings = [Reading() for _ in inputs]
    files = [read_documents(path, reading) for path, reading in zip(inputs, readings, strict=True)]
    total_bytes = sum(path.stat().st_size for path in inputs)
    line, start = ProgressLine(), time.monotonic()
    try:
        with CorpusWriter(out, tokenizer, held_out) as writer:
            for documents in files:
                for ids, texts in in_batches(documents):
                    writer.add(ids, tokenizer.encode_batch(texts))
                    if show_progress:
                        line.show(progress(readings, total_bytes, time.monotonic() - start))
            return finish(writer, inputs, readings)
    except OSError as error:
        if error.filename is not None:
            raise
        raise InputError(f"{out}: {error.strerror or error}") from None  # a full disk names no file
    finally:
        line.clear()


def finish(
    writer: CorpusWriter, inputs: Sequence[Path], readings: Sequence[Reading]
) -> dict[str, Any]:
    """Put the corpus in its place, with what each file contributed noted in its meta.json."""
    if not any(reading.documents for reading in readings):
        others = f" and {len(inputs) - 1} more" if len(inputs) > 1 else ""
        titles = sum(reading.titles_only for reading in readings)
        raise InputError(f"{inputs[0]}{others}: no documents ({titles} titles without an abstract)")
    return writer.finish(
        [
            {
                "name": path.name,
                "sha256": sha256_of_files(path),
                "documents": reading.documents,
                "titles_only": reading.titles_only,
            }
            for path, reading in zip(inputs, readings, strict=True)
        ]
    )


def in_batches(
    documents: Iterable[tuple[str, str]],
) -> Iterator[tuple[list[str], list[str]]]:
    """Ids and texts of the documents, in lists of about BATCH_CHARACTERS."""
    ids: list[str] = []
    texts: list[str] = []
    characters = 0
    for document_id, text in documents:
        ids.append(document_id)
        texts.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield ids, texts
            ids, texts, characters = [], [], 0
    if ids:
        yield ids, texts


def progress(readings: Sequence[Reading], total_bytes: int, seconds: float) -> str:
    """How far it is, how fast and for how long still; MB are those of the files on the disk."""
    bytes_read = sum(reading.bytes_read for reading in readings)
    documents = sum(reading.documents for reading in readings)
    return (
        f"{bytes_read / total_bytes:4.0%}  {documents:,} documents  "
        f"{documents / seconds:,.0f} documents/s  {bytes_read / seconds / 1e6:.2f} MB/s  "
        f"{duration(seconds * (total_bytes - bytes_read) / bytes_read)} left"
    )


def summary(meta: dict[str, Any], out: Path) -> str:
    """What was made, for people."""
    documents, tokens = meta["documents"], meta["tokens"]
    titles = sum(source["titles_only"] for source in meta["inputs"])
    unknown = meta["unk_tokens"] / tokens
    doubt = "; is this the tokenizer for this text?" if unknown > MANY_UNKNOWN else ""
    return "\n".join(
        (
            f"documents   {documents:,}, {meta['held_out_documents']:,} of them held out",
            f"left out    {titles:,} titles without an abstract",
            f"tokens      {tokens:,}, {tokens / documents:.1f} a document",
            f"[UNK]       {unknown:.3%} of the tokens{doubt}",
            f"written to  {out}",
            f"next        python train.py --data {out} --teacher TEACHER --out RUN",
        )
    )


def main() -> None:
    parser = ArgumentParser(
        prog="python -m minibert.prepare",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="text file")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        type=Path,
        required=True,
        help="vocab.txt, tokenizer.json or a folder that holds one",
    )
    parser.add_argument("--out", metavar="CORPUS", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--held-out",
        metavar="SHARE",
        type=number(float, 0),
        default=0.05,
        help="share of the documents kept for evaluation (default: 0.05)",
    )
    flags = parser.parse_args()
    meta = prepare(flags.inputs, flags.tokenizer, flags.out, flags.held_out)
    print(summary(meta, flags.out))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
