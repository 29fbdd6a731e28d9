"""What docs/results.md and README.md quote is what the stored results say."""

import re
import shlex
import sys

import commands
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import results

PAGES = {page.name: page.read_text() for page in results.PAGES}


def decimals(text: str) -> set[str]:
    """All numbers with a decimal point that stand in a text."""
    return set(re.findall(r"(?<![\w.])\d+\.\d+(?!\w|\.\d)", text))


def prose(page: str) -> str:
    """What was written by hand: no tables, no code, no addresses of links."""
    page = re.sub(r"<!-- table \w+ -->.*?<!-- end -->", "", page, flags=re.DOTALL)
    return re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", page, flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_stored_results(page):
    assert results.filled(PAGES[page], results.tables()) == PAGES[page]


def test_every_table_is_shown():
    shown = {name for page in PAGES.values() for name in re.findall(r"<!-- table (\w+) -->", page)}
    assert shown == set(results.tables())


def test_numbers_between_the_tables_are_in_them():
    """But for published ones and versions of licences, under headings of their own."""
    told = decimals(" ".join(results.markdown(table) for table in results.tables().values()))
    page = prose(PAGES["results.md"])
    others = r"\n## (Published|Where the texts).*?(?=\n## )"
    quoted = decimals(re.sub(others, "", page, flags=re.DOTALL))
    assert len(quoted) > 10 and quoted <= told
    section = re.search(r"\n## Does it distil\?.*?(?=\n## )", PAGES["README.md"], re.DOTALL)[0]
    assert decimals(prose(section)) <= told


def test_numbers_are_seen_wherever_they_stand():
    assert decimals("0.5, (0.25) and 1.75. Not 2.13.0, nor v1.5 or 12") == {"0.5", "0.25", "1.75"}


def test_the_commands_have_the_flags_of_their_programs():
    """Those of docs/results.md; a test of README.md runs its own."""
    for command in re.findall(r"^python (.*)$", PAGES["results.md"].replace("\\\n", ""), re.M):
        program, *words = shlex.split(command)
        program = [program] if program.endswith(".py") else ["-m", words.pop(0)]
        told = commands.run(*program, "--help").stdout
        for flag in filter(lambda word: word.startswith("--"), words):
            assert flag in told, (program, flag)


def test_a_wrong_number_is_put_right():
    table = {"some": [["", "KL"], ["a", "0.5"]]}
    page = "before\n<!-- table some -->\n| wrong |\n<!-- end -->\nafter"
    right = "before\n<!-- table some -->\n|  | KL |\n|---|---|\n| a | 0.5 |\n<!-- end -->\nafter"
    assert results.filled(page, table) == right
    with pytest.raises(results.InputError, match="no table 'some'"):
        results.filled(page, {})


def test_means_differences_and_verdicts():
    """By hand: three seeds, a variant 0.1 farther each time but for a hundredth."""
    runs = {
        "compactbiobert": {"title": "base", "seeds": seeds(0.10, 0.12, 0.11)},
        "far": {"title": "far", "seeds": seeds(0.20, 0.23, 0.20)},
        "noise": {"title": "noise", "seeds": seeds(0.09, 0.13, 0.12)},
        "near": {"title": "near", "seeds": seeds(0.05, 0.07, 0.06)},
    }
    study = {"runs": runs, "teacher": {"teacher_mlm_loss": 0.5, "teacher_mlm_accuracy": 0.75}}
    table = results.study_table(study, ("compactbiobert",))
    assert table[1] == ["teacher", "0.5000", "0.7500", "", ""]
    assert table[2][3] == "0.1100 ± 0.0100"
    rows = results.differences_table(study, ("far", "noise", "near"))[1:]
    assert [row[-1] for row in rows] == ["farther", "not told apart", "nearer"]
    assert rows[0][3] == "0.1000 ± 0.0100"


def test_a_verdict_is_that_of_a_t_test():
    """Pairs one deviation apart around their mean, just inside and just outside the bound."""
    for count, bound in {2: 12.706, 3: 4.303, 5: 2.776}.items():  # any table of Student's t
        assert results.T_5_PERCENT[count] == bound
        gaps = [float(number % 2) for number in range(count)]
        mean, deviation = results.mean_and_deviation(gaps)
        edge = bound * deviation / count**0.5
        inside, outside = ([g - mean + edge * by for g in gaps] for by in (0.99, 1.01))
        assert results.verdict(inside) == "not told apart"
        assert results.verdict(outside) == "farther"
        assert results.verdict([-gap for gap in outside]) == "nearer"
    assert results.verdict([0.5]) == "1 seeds"


def seeds(*kls: float) -> dict:
    return {str(seed): {"final": [1.0, 0.5, kl, 0.75]} for seed, kl in enumerate(kls)}


def test_pictures_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    import study_pictures

    written = list(study_pictures.draw(results.stored("study"), tmp_path))
    assert [path.read_bytes()[:4] for path in written] == [b"\x89PNG"] * 2
