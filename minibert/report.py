"""Runs as pictures: PNG files, and one HTML page that holds them all.

    python -m minibert.report runs/compact runs/other --out report
    python -m minibert.report runs/compact --maps "Aspirin inhibits platelet aggregation."

RUN is a run folder of train.py. Drawn over each other: losses, learning rate, throughput, held-out
figures against updates and against time. With --maps also the attention maps of a text, teacher's
and student's side by side, and how near each layer is to the teacher's, before training and after.
Needs the extra `report`: pip install "minibert[report]".
"""

import platform
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from minibert.errors import ArgumentParser, InputError, run_command
from minibert.files import atomic_file
from minibert.flags import number

if TYPE_CHECKING:
    from minibert.pictures.drawing import Picture
    from minibert.pictures.runs import Run

PAGE = "report.html"


def require_matplotlib() -> None:
    """Matplotlib draws; where it is not installed, an InputError tells how to."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            'the pictures need matplotlib, which is not installed: pip install "minibert[report]"'
        ) from None


def pictures_of_models(flags: Namespace) -> "list[Picture]":
    """What --maps asks for; none without it."""
    if flags.maps is None:
        return []
    from minibert.pictures.compared import held_out_documents, load_pair, run_around
    from minibert.pictures.maps import pictures_of_pair

    student = flags.student or flags.runs[0] / "student"
    pair, documents = load_pair(student, flags.teacher), None
    if flags.data is not None:
        run = run_around(student)
        longest = 256 if run is None else run.resolved().max_length
        documents = held_out_documents(pair, flags.data, flags.documents or 100, longest)
    return pictures_of_pair(pair, flags.maps, flags.head, documents)


def write_report(out: Path, runs: "Sequence[Run]", pictures: "Sequence[Picture]") -> list[Path]:
    """Write the pictures and the page into the folder `out`; returns the files.

    Other files in the folder stay as they are.
    """
    from minibert.pictures.page import report_page
    from minibert.pictures.runs import table

    labels = [run.label for run in runs]
    title = f"Report: {', '.join(labels)}" if runs else "Report: a student and its teacher"
    versions = {"minibert": "minibert", "matplotlib": "matplotlib", "torch": "torch"}
    versions = {"python": platform.python_version()} | {
        name: metadata.version(package) for name, package in versions.items()
    }
    page = report_page(title, labels, table(runs) if runs else {}, pictures, versions)
    files = {picture.name: picture.png for picture in pictures} | {PAGE: page.encode()}
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        with atomic_file(out / name) as partial:
            partial.write_bytes(content)
    return [out / name for name in files]


def parse_flags() -> Namespace:
    parser = ArgumentParser(
        prog="python -m minibert.report",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="*", type=Path, help="run folder of train.py")
    out = "folder to write (default: report)"
    add("--out", metavar="DIR", type=Path, default=Path("report"), help=out)
    add("--maps", metavar="TEXT", help="the attention maps of this text, and the layers' nearness")
    student = "model folder of the student (default: RUN/student)"
    add("--student", metavar="MODEL", type=Path, help=student)
    teacher = "model folder of the teacher (default: as the student's run tells)"
    add("--teacher", metavar="MODEL", type=Path, help=teacher)
    head = "maps of this head, counted from 0, alone (default: the mean over heads)"
    add("--head", metavar="N", type=number(int, 0), help=head)
    data = "corpus over whose held-out documents layers are compared (default: over the text)"
    add("--data", metavar="CORPUS", type=Path, help=data)
    documents = "held-out documents, of --data (default: 100)"
    add("--documents", metavar="N", type=number(int, 1), help=documents)
    return checked(parser.parse_args())


def checked(flags: Namespace) -> Namespace:
    """Refuses at once what does not go together, or cannot be written later."""
    if flags.maps is None:
        for name in ("student", "teacher", "head", "data"):
            if getattr(flags, name) is not None:
                raise InputError(f"--{name} goes with --maps TEXT")
        if not flags.runs:
            raise InputError("no RUN; expected a run folder of train.py, or --maps TEXT")
    if flags.documents is not None and flags.data is None:
        raise InputError("--documents goes with --data CORPUS")
    if flags.maps is not None and flags.student is None and len(flags.runs) != 1:
        raise InputError(f"--maps shows one student: of {len(flags.runs)} RUNs, name --student")
    if flags.out.exists() and not flags.out.is_dir():
        raise InputError(f"{flags.out}: a file; expected a folder to write")
    return flags


def main() -> None:
    flags = parse_flags()
    require_matplotlib()
    from minibert.pictures.curves import pictures_of_runs
    from minibert.pictures.runs import read_runs

    runs = read_runs(flags.runs)
    of_models = pictures_of_models(flags)  # first, for more can be wrong with them
    pictures = [*(pictures_of_runs(runs) if runs else ()), *of_models]
    for path in write_report(flags.out, runs, pictures):
        print(path)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
