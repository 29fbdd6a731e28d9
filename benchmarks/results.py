"""The tables and pictures of docs/results.md and README.md, from the stored results.

    python benchmarks/results.py             writes the tables into the pages, draws the pictures
    python benchmarks/results.py --tables    the tables alone

Results lie in benchmarks/results/ as study.py and biomedical.py wrote them. In a page a table
stands between `<!-- table NAME -->` and `<!-- end -->`; all else in the page is left as it is.
Pictures need `pip install -e ".[report]"`.
"""

import re
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from biomedical import SHALLOW_LAYERS, TIMES
from study import FIGURES

from minibert.errors import ArgumentParser, InputError, run_command
from minibert.files import atomic_file, read_json, read_text
from minibert.tasks.scores import mean_and_deviation

ROOT = Path(__file__).parent.parent
RESULTS, PICTURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "pictures"
PAGES = (ROOT / "docs" / "results.md", ROOT / "README.md")
HEADS = ("MLM loss", "accuracy", "KL to teacher", "agreement")
SAME = ("plain", "float32")  # variants that ought to change nothing
HEADLINE = ("compactbiobert", "last-layers", "distilbiobert", "mlm", "random")
KL = FIGURES.index("teacher_kl")
# Student's t, two-sided, by the number of pairs (degrees of freedom: one less).
T_5_PERCENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
Table = list[list[str]]  # the first row is the head


def stored(name: str) -> dict[str, Any]:
    """What a benchmark has written."""
    return read_json(RESULTS / f"{name}.json")


def spread(values: list[float], digits: int = 4) -> str:
    """0.1336 ± 0.0021: mean and standard deviation of a sample."""
    mean, deviation = mean_and_deviation(values)
    told = f"{round(mean, digits) + 0.0:.{digits}f}"  # no minus before a zero
    return told if len(values) < 2 else f"{told} ± {deviation:.{digits}f}"


# The study.


def final(study: dict[str, Any], variant: str, figure: str) -> list[float]:
    """A figure of a variant at the end of each seed's run."""
    place = FIGURES.index(figure)
    return [run["final"][place] for run in study["runs"][variant]["seeds"].values()]


def study_table(study: dict[str, Any], variants: tuple[str, ...]) -> Table:
    """A row a variant: held-out figures over the seeds."""
    own = (f"{study['teacher'][f'teacher_{name}']:.4f}" for name in FIGURES[:2])
    rows = [["", *HEADS], ["teacher", *own, "", ""]]
    for name in variants:
        figures = (spread(final(study, name, figure)) for figure in FIGURES)
        rows.append([study["runs"][name]["title"], *figures])
    return rows


def differences_table(study: dict[str, Any], variants: tuple[str, ...]) -> Table:
    """How far each variant ends from `compactbiobert` with the same seed, over the seeds.

    The last column is Student's paired t-test at 5 %, on the KL to the teacher.
    """
    rows = [["minus `compactbiobert`, seed by seed", *HEADS, "verdict on KL"]]
    for name in variants:
        gaps = [differences(study, name, figure) for figure in FIGURES]
        cells = [spread(gap) for gap in gaps]
        rows.append([study["runs"][name]["title"], *cells, verdict(gaps[KL])])
    return rows


def differences(study: dict[str, Any], variant: str, figure: str) -> list[float]:
    """A variant's figure minus that of `compactbiobert`, for the seeds that both have."""
    base, other = (study["runs"][name]["seeds"] for name in (HEADLINE[0], variant))
    place = FIGURES.index(figure)
    return [
        other[seed]["final"][place] - base[seed]["final"][place] for seed in base if seed in other
    ]


def verdict(gaps: list[float], below: str = "nearer", above: str = "farther") -> str:
    """Whether differences, in KL, are more than their spread lets one expect by chance.

    That they are not does not say that there is none.
    """
    mean, deviation = mean_and_deviation(gaps)
    if len(gaps) not in T_5_PERCENT:
        return f"{len(gaps)} seeds"
    if abs(mean) <= T_5_PERCENT[len(gaps)] * deviation / len(gaps) ** 0.5:
        return "not told apart"
    return below if mean < 0 else above


# The biomedical models.

LAYERS = {"shallow": SHALLOW_LAYERS, "teacher": SHALLOW_LAYERS * TIMES}  # of the others 6
NAMES = {
    "shallow": "shallow model", "teacher": "teacher", "compactbiobert": "`compactbiobert`",
    "distilbiobert": "`distilbiobert`", "mlm": "masked words alone",
    "copied": "copied layers, learnt nothing more", "random": "random, never pre-trained",
}  # fmt: skip
SCORES = {"f1": "F1", "piece_f1": "F1 of pieces", "group_f1": "F1 of groups"}


def pretraining_table(results: dict[str, Any]) -> Table:
    """A row a pre-trained model: held-out figures before the first and after the last update."""
    rows = [["", "layers", "updates", *HEADS]]
    for name, run in results["pretraining"].items():
        before, after = run["curve"][0], run["curve"][-1]
        cells = []
        for figure in FIGURES:
            key = f"held_out_{figure}"
            cells.append(f"{before[key]:.4f} → {after[key]:.4f}" if key in after else "")
        rows.append([NAMES[name], str(LAYERS.get(name, 6)), f"{after['step']:,}", *cells])
    return rows


def tasks_table(results: dict[str, Any]) -> Table:
    """A row a model: scores on the test set of each task, over the seeds."""
    columns = [
        (task, score, f"{task} {title}")
        for task, models in results["tasks"].items()
        for score, title in SCORES.items()
        if score in next(iter(models.values()))
    ]
    rows = [["", *(title for *_, title in columns)]]
    for name in NAMES:
        cells = []
        for task, score, _ in columns:
            told = results["tasks"][task].get(name)
            cells.append(spread(told[score]["values"], digits=3) if told else "")
        if any(cells):
            rows.append([NAMES[name], *cells])
    return rows


def task_differences_table(results: dict[str, Any]) -> Table:
    """How far each model's F1 is from that of `compactbiobert`'s student, over the seeds."""
    tasks = results["tasks"]
    titles = [title for task in tasks for title in (f"{task} F1", "verdict")]
    rows = [["minus `compactbiobert`, seed by seed", *titles]]
    for name in NAMES:
        cells = []
        for models in tasks.values():
            if name == HEADLINE[0] or name not in models:
                continue
            base, other = (
                dict(zip(models[each]["seeds"], models[each]["f1"]["values"], strict=True))
                for each in (HEADLINE[0], name)
            )
            gaps = [other[seed] - base[seed] for seed in base if seed in other]
            cells += [spread(gaps, digits=3), verdict(gaps, "lower", "higher")]
        if cells:
            rows.append([NAMES[name], *cells])
    return rows


# The pages.


def tables() -> dict[str, Table]:
    """All tables by the names that pages know them by."""
    study, biomedical = stored("study"), stored("biomedical")
    others = tuple(name for name in study["runs"] if name not in SAME)
    return {
        "headline": study_table(study, HEADLINE),
        "study": study_table(study, others),
        "differences": differences_table(study, others[1:]),
        "same": differences_table(study, SAME),
        "pretraining": pretraining_table(biomedical),
        "tasks": tasks_table(biomedical),
        "task_differences": task_differences_table(biomedical),
    }


def markdown(table: Table) -> str:
    """| a | b | and so on."""
    lines = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def filled(page: str, there: dict[str, Table]) -> str:
    """The page with its tables as the results have them."""

    def block(match: re.Match) -> str:
        if (name := match[1]) not in there:
            raise InputError(f"no table {name!r}; known: {', '.join(there)}")
        return f"<!-- table {name} -->\n{markdown(there[name])}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", block, page, flags=re.DOTALL)


def main() -> None:
    parser = ArgumentParser(
        prog="python benchmarks/results.py",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tables", action="store_true", help="write no pictures")
    flags = parser.parse_args()
    there = tables()
    for page in PAGES:
        with atomic_file(page) as partial:
            partial.write_text(filled(read_text(page), there), encoding="utf-8")
        print(f"written: {page.relative_to(ROOT)}")
    if not flags.tables:
        from study_pictures import draw  # needs matplotlib

        for path in draw(stored("study"), PICTURES):
            print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
