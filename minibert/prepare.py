"""Text files to a corpus folder that `train.py` can learn from.

    python -m minibert.prepare INPUT... --tokenizer vocab.txt --out CORPUS [--held-out 0.05]

INPUT: PubMed's .xml, or .tsv (id, title, abstract), .jsonl ("text"), .txt (a document a line), each
also as .gz; or - for standard input. Of several records of one id the last one counts, in the order
of the files. The same input gives the same corpus, byte for byte, with any number of workers.

Files that are done are kept in CORPUS.shards until the corpus stands: a command that was stopped,
given again, goes on with the others.
"""

import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minibert.data.corpus import META
from minibert.data.merge import check_room, merge
from minibert.data.pubmed import FORMATS, read_documents
from minibert.data.reading import STANDARD_INPUT
from minibert.data.shards import Settings, Shard, dtype_for, find_shard, made_with
from minibert.data.tokenizer import Tokenizer, load_tokenizer
from minibert.data.workers import Progress, Task, estimated_bytes, num_cores, shards_made
from minibert.data.working import (
    forget_shards,
    is_full,
    refuse_full,
    shard_folder,
    working_folder,
)
from minibert.errors import (
    INTERRUPTED_STATUS,
    ArgumentParser,
    InputError,
    Stopped,
    in_one_line,
    run_command,
)
from minibert.files import read_json, sha256_of_files
from minibert.flags import number
from minibert.progress import ProgressLine

DEFAULTS = Settings()
MANY_UNKNOWN = 0.02  # share of [UNK]; biomedical text with BioBERT's vocabulary has 0.0001
MANY_REPLACED = 0.5  # share of a file's documents; PubMed's update files replace a few of a hundred


def prepare(
    inputs: Sequence[Path],
    tokenizer_path: Path,
    out: Path,
    held_out: float = 0.05,
    show_progress: bool = True,
    *,
    settings: Settings = DEFAULTS,
    workers: int = 1,
    skip_bad_files: bool = False,
) -> dict[str, Any]:
    """Write the documents of `inputs` as the corpus folder `out` and return its meta.json.

    Args:
        tokenizer_path: a vocab.txt, a tokenizer.json or a folder that holds one.
        held_out: share of the documents kept for evaluation, 0 to below 1.
        settings: which parts of a record are its text; what standard input is.
        workers: processes, at most one a file; a single one is this process.
        skip_bad_files: leave out files that cannot be read to their ends, rather than end with the
            first; meta.json names them ("skipped").

    Raises InputError for bad input, KeyboardInterrupt when interrupted; both say how many files are
    done. `out` is not there then.
    """
    check_arguments(inputs, out, held_out, settings, skip_bad_files)
    tokenizer = load_tokenizer(tokenizer_path)
    with working_folder(out) as working:
        if is_full(out):
            return what_stands(out, inputs, tokenizer, held_out, settings)
        tasks = [Task(path, shard_folder(working, path)) for path in inputs]
        way = made_with(tokenizer, settings)
        with telling_what_is_done(tasks, way):
            needed = estimated_bytes(tasks, way) * dtype_for(tokenizer).itemsize // 2
            check_room(working, needed, f"{out} and what it is made from")
            skipped = make_shards(
                tasks, tokenizer, settings, workers, skip_bad_files, show_progress
            )
            shards = [find_shard(task.folder) for task in tasks if task.path not in skipped]
            if not any(shard.meta["counts"]["documents"] for shard in shards):
                forget_shards(working)
                raise InputError(nothing_there(inputs, skipped, shards))
            reasons = [(path.name, skipped[path]) for path in inputs if path in skipped]
            more_meta = {
                "section_labels": settings.section_labels,
                "titles_only_are_documents": settings.titles_only,
                "skipped": [{"name": name, "reason": reason} for name, reason in reasons],
            }
            return merge(shards, out, tokenizer, held_out, more_meta, quiet=not show_progress)


# ---- Before the work -----------------------------------------------------------------------------


def check_arguments(
    inputs: Sequence[Path], out: Path, held_out: float, settings: Settings, skip_bad_files: bool
) -> None:
    """Refuse what cannot work before anything is written."""
    if not 0 <= held_out < 1:
        raise InputError(f"held-out share {held_out}: expected a number from 0 to below 1")
    if out.name in ("", ".."):
        raise InputError(f"{out}: expected the name of a new folder")
    if STANDARD_INPUT in inputs and settings.stdin_format is None:
        raise InputError("-: of standard input --stdin-format must say what it is")
    if STANDARD_INPUT not in inputs and settings.stdin_format is not None:
        raise InputError("--stdin-format is for standard input; no - among the files")
    seen = set()
    for path in inputs:
        if not skip_bad_files:
            read_documents(path, **asdict(settings))  # refuses what is missing, or no known format
        where = path.resolve()
        if where in seen:
            raise InputError(f"{path}: given twice")
        seen.add(where)


def what_stands(
    out: Path, inputs: Sequence[Path], tokenizer: Tokenizer, held_out: float, settings: Settings
) -> dict[str, Any]:
    """The meta.json of a corpus whose maker was killed before it could tidy up.

    Raises InputError where it is not what is asked for now.
    """
    if not (out / META).is_file():
        refuse_full(out)
    meta = read_json(out / META)
    asked = {
        "held_out_share": held_out,
        "vocabulary_sha256": tokenizer.vocabulary_sha256,
        "section_labels": settings.section_labels,
        "titles_only_are_documents": settings.titles_only,
        "skipped": [],
    }
    is_that = all(meta.get(name) == value for name, value in asked.items())
    if not is_that or STANDARD_INPUT in inputs:
        refuse_full(out)
    if [sha256_of_files(path) for path in inputs] != [part["sha256"] for part in meta["inputs"]]:
        refuse_full(out)
    return meta


# ---- While it goes on ----------------------------------------------------------------------------


@contextmanager
def telling_what_is_done(tasks: Sequence[Task], way: dict[str, Any]) -> Iterator[None]:
    """Who is stopped in here is told what need not be done again."""
    try:
        yield
    except (InputError, OSError) as error:
        done = what_is_done(tasks, way) if num_done(tasks, way) else ""
        raise InputError(in_one_line(error) + done) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted{what_is_done(tasks, way)}") from None


def what_is_done(tasks: Sequence[Task], way: dict[str, Any]) -> str:
    """Of a run that has come to its end too early."""
    done = f"{num_done(tasks, way)} of {len(tasks)} files are done"
    return f"; {done}, the same command goes on from there"


def num_done(tasks: Sequence[Task], way: dict[str, Any]) -> int:
    """How many files have a finished shard that can be used; standard input is read anew."""
    return sum(path != STANDARD_INPUT and bool(find_shard(folder, way)) for path, folder in tasks)


def make_shards(
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    settings: Settings,
    workers: int,
    skip_bad_files: bool,
    show_progress: bool,
) -> dict[Path, str]:
    """Make the shards of all files; returns those that are bad, and why, if they may be."""
    line, progress = ProgressLine(), Progress([task.path for task in tasks])
    skipped = {}
    try:
        with closing(shards_made(tasks, tokenizer, settings, workers)) as events:
            for event in events:
                progress.note(event)
                if show_progress:
                    line.show(progress.text(time.monotonic() - progress.start))
                if event.kind == "bad" and not skip_bad_files:
                    raise InputError(event.reason)
                if event.kind == "bad":
                    skipped[event.path] = event.reason
    finally:
        line.clear()
    return skipped


# ---- At the end ----------------------------------------------------------------------------------


def nothing_there(inputs: Sequence[Path], skipped: dict[Path, str], shards: list[Shard]) -> str:
    """Why no corpus can be made."""
    if len(skipped) == len(inputs):
        return f"{skipped[inputs[0]]}; no other file is whole, either"
    titles = sum(shard.meta["counts"]["titles_only"] for shard in shards)
    others = f" and {len(inputs) - 1} more" if len(inputs) > 1 else ""
    return f"{inputs[0]}{others}: no documents ({titles} titles without an abstract)"


def mostly_replaced(part: dict[str, Any]) -> bool:
    """Whether most documents of a file were replaced; of a .txt those are lines that came again."""
    given = part["documents"] + part["replaced"] + part["deleted"]
    is_text = (part["name"] or "").lower().removesuffix(".gz").endswith(".txt")
    return part["replaced"] > MANY_REPLACED * given and not is_text


def summary(meta: dict[str, Any], out: Path) -> str:
    """What was made, for people."""
    documents, tokens, totals = meta["documents"], meta["tokens"], meta["totals"]
    unknown = meta["unk_tokens"] / tokens
    unknown_doubt = "; is this the tokenizer for this text?" if unknown > MANY_UNKNOWN else ""
    lines = [
        f"documents   {documents:,}, {meta['held_out_documents']:,} of them held out",
        f"left out    {totals['titles_only']:,} titles without an abstract",
        f"tokens      {tokens:,}, {tokens / documents:.1f} a document",
        f"[UNK]       {unknown:.3%} of the tokens{unknown_doubt}",
        f"written to  {out}",
        f"next        python train.py --data {out} --teacher TEACHER --out RUN",
    ]
    if totals["replaced"] or totals["deleted"]:
        doubtful = next((part["name"] for part in meta["inputs"] if mostly_replaced(part)), None)
        doubt = f"; most of {doubtful}: are its ids unique among all files?" if doubtful else ""
        lines.insert(
            2,
            f"replaced    {totals['replaced']:,} by later ones of the same id, "
            f"{totals['deleted']:,} deleted{doubt}",
        )
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser(
        prog="python -m minibert.prepare",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add_flags(parser)
    flags = parser.parse_args()
    labels, titles = flags.section_labels == "yes", flags.title_only == "yes"
    try:
        meta = prepare(
            flags.inputs,
            flags.tokenizer,
            flags.out,
            flags.held_out,
            settings=Settings(labels, titles, flags.stdin_format),
            workers=flags.workers or num_cores(),
            skip_bad_files=flags.skip_bad_files,
        )
    except KeyboardInterrupt as interrupt:
        if not str(interrupt):
            raise
        print(interrupt, file=sys.stderr)
        raise Stopped(INTERRUPTED_STATUS) from None
    print(summary(meta, flags.out))
    for skipped in meta["skipped"]:
        print(f"skipped: {skipped['reason']}", file=sys.stderr)
    if meta["skipped"]:
        raise Stopped(1)


def add_flags(parser: ArgumentParser) -> None:
    parser.add_argument("inputs", metavar="INPUT", nargs="+", type=Path, help="text file, or -")
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
    parser.add_argument(
        "--section-labels",
        choices=("yes", "no"),
        default="yes",
        help="keep the labels of the sections of structured abstracts (default: yes)",
    )
    parser.add_argument(
        "--title-only",
        choices=("yes", "no"),
        default="no",
        help="keep records that have a title but no abstract (default: no)",
    )
    parser.add_argument(
        "--stdin-format",
        choices=[suffix[1:] for suffix in FORMATS],
        help="what comes from standard input when INPUT is -",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=number(int, 1),
        help="processes, each with a file of its own (default: one a core, at most one a file)",
    )
    parser.add_argument(
        "--skip-bad-files",
        action="store_true",
        help="leave out files that cannot be read to their ends, list them, end with status 1",
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
