"""What docs/results.md and README.md quote is what the stored results say."""

import re
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import results

PAGES = {page.name: page.read_text() for page in results.PAGES}


def decimals(text: str) -> set[str]:
    """All numbers with a decimal point that stand in a text."""
    return set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", text))


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_stored_results(page):
    assert results.filled(PAGES[page], results.tables()) == PAGES[page]


def test_every_table_is_shown():
    shown = {name for page in PAGES.values() for name in re.findall(r"<!-- table (\w+) -->", page)}
    assert shown == set(results.tables())


def test_numbers_between_the_tables_are_in_them():
    """But for the published ones, whose paragraph says so, and what is said in code."""
    page = re.sub(r"```.*?```", "", PAGES["results.md"], flags=re.DOTALL)
    published = re.search(r"## Published.*?(?=\n## |\Z)", page, flags=re.DOTALL)[0]
    told = decimals(" ".join(results.markdown(table) for table in results.tables().values()))
    own = page.replace(published, "")
    assert decimals(own) > set()
    assert decimals(own) <= told


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
    assert [row[-1] for row in rows] == ["farther", "as near", "nearer"]
    assert rows[0][3] == "0.1000 ± 0.0100"


def seeds(*kls: float) -> dict:
    return {str(seed): {"final": [1.0, 0.5, kl, 0.75]} for seed, kl in enumerate(kls)}


def test_pictures_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    import study_pictures

    written = list(study_pictures.draw(results.stored("study"), tmp_path))
    assert [path.read_bytes()[:4] for path in written] == [b"\x89PNG"] * 2
