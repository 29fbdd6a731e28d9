"""The annotated page does in Chromium what it says: wide, narrow, light, dark, by mouse and keys.

Opt-in: it needs selenium (the extra `browser`), and Chromium with its driver (Debian: the packages
chromium and chromium-driver); without them it is skipped.
"""

import dataclasses
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, TOY_CONFIG

from minibert import audit
from minibert.errors import run_command

webdriver = pytest.importorskip(
    "selenium.webdriver", reason="selenium is not installed (pip install -e '.[browser]')"
)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("no Chromium with its chromedriver on the PATH", allow_module_level=True)

from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

WIDE, NARROW = (1400, 1000), (360, 740)


def line_of(file: str, code: str) -> str:
    """The one line of a file of ours that holds this code, as the page names it."""
    lines = enumerate((ROOT / file).read_text().splitlines(), start=1)
    (number,) = [number for number, line in lines if code in line]
    return f"{file}:{number}"


# Both products of a feed-forward network, and what stands between them:
LINE = line_of("minibert/model.py", "output = ops.feed_forward(")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> SimpleNamespace:
    """A page of a toy step with precision, in a folder of a hostile name, and the same as JSON."""
    folder = tmp_path_factory.mktemp("page") / "<img src=x onerror=alert(1)>"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(TOY_CONFIG)))
    files = {"--html": folder / "audit.html", "--json": folder / "ledger.json"}
    flags = [str(part) for pair in files.items() for part in pair]
    with pytest.MonkeyPatch.context() as patch:
        model = ["--model", str(folder / "config.json"), "--precision"]
        patch.setattr(sys, "argv", ["minibert.audit", *model, *flags])
        assert run_command(audit.main) == 0
    ledger = json.loads(files["--json"].read_text())
    return SimpleNamespace(url=files["--html"].as_uri(), ledger=ledger)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ["headless=new", "disable-dev-shm-usage", "hide-scrollbars"]
    flags += [f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("no-sandbox")  # Chromium's sandbox is not for root
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page):
    """Open the page: size, colour scheme, place in it. Returns helpers around the browser."""

    def find(selector: str):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def row(place: str):
        return browser.find_element(By.ID, place)

    def open_page(size=WIDE, scheme="light", place="", media=""):
        browser.get("about:blank")
        browser.get_log("browser")
        browser.get_log("performance")
        width, height = size
        sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        told = {"features": features, "media": media}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", told)
        browser.get(page.url + (f"#{place}" if place else ""))
        return SimpleNamespace(
            browser=browser,
            find=find,
            row=row,
            all=lambda selector: browser.find_elements(By.CSS_SELECTOR, selector),
            run=browser.execute_script,
            focused=lambda: browser.switch_to.active_element,
            press=lambda *keys: browser.switch_to.active_element.send_keys(*keys),
            status=lambda: find("#status").text,
        )

    return open_page


def figures(row) -> list[str]:
    """What stands in the cells of a line of source: calls, FLOPs, their share, bytes, ..."""
    return [cell.text for cell in row.find_elements(By.CSS_SELECTOR, "td:not(.source)")]


def calls(row) -> int:
    return int(figures(row)[0].replace(",", "") or 0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, (800, 900), (390, 844), NARROW])
def test_it_opens_quietly_and_fits(opened, size, scheme):
    shown = opened(size, scheme)
    assert shown.browser.get_log("browser") == []
    events = [json.loads(entry["message"]) for entry in shown.browser.get_log("performance")]
    requests = [
        event["message"]["params"]["request"]["url"]
        for event in events
        if event["message"]["method"] == "Network.requestWillBeSent"
    ]
    assert all(url.startswith(("file:", "data:")) for url in requests), requests
    assert sum(url.startswith("file:") for url in requests) == 1
    assert shown.run("return document.documentElement.scrollWidth") <= size[0]
    assert shown.find(".recorded").text.count("<img src=x onerror=alert(1)>") == 1
    assert not shown.all("img")
    cut = shown.run(  # code that sticks out of the window
        "return [...document.querySelectorAll('code')].filter("
        "code => code.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert cut == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(opened, scheme):
    """4.5 : 1 at least (WCAG AA), for each colour of text on each ground that it stands on."""
    shown = opened(scheme=scheme)
    names = (
        "paper", "raised", "ink", "soft", "accent", "found", "open", "flops", "bytes", "comment",
        "string", "keyword",
    )  # fmt: skip
    told = "return getComputedStyle(document.documentElement).getPropertyValue(arguments[0])"
    light = {name: luminance(shown.run(told, f"--{name}").strip()) for name in names}
    texts = ("ink", "soft", "accent", "comment", "string", "keyword")
    pairs = [(text, ground) for text in texts for ground in ("paper", "raised", "open", "found")]
    pairs += [("ink", "flops"), ("ink", "bytes"), ("paper", "ink"), ("paper", "accent")]
    for text, ground in pairs:
        dim, bright = sorted((light[text], light[ground]))
        assert (bright + 0.05) / (dim + 0.05) >= 4.5, (text, ground)
    assert (light["paper"] > light["ink"]) == (scheme == "light")
    ground = shown.run("return getComputedStyle(document.body).backgroundColor")
    red, green, blue = map(int, re.findall(r"\d+", ground)[:3])
    assert luminance(f"#{red:02x}{green:02x}{blue:02x}") == light["paper"]


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_a_click_on_a_line_shows_its_operations(opened, page, size):
    shown = opened(size)
    shown.run("arguments[0].scrollIntoView({block: 'center'})", shown.row(LINE))
    shown.row(LINE).find_element(By.CSS_SELECTOR, "code").click()
    details = shown.find(".details table")
    assert details.is_displayed()
    names = [stack for stack, lines in enumerate(page.ledger["stacks"]) if LINE in lines]
    there = [entry for entry in page.ledger["operations"] if entry["stack"] in names]
    told = [cell.text for cell in shown.all(".details tbody tr:not(.phase) td:first-child")]
    assert sum(int(text.removeprefix("×")) for text in told) == len(there)
    assert calls(shown.row(LINE)) == len(there)
    assert "gelu.default" in details.text
    assert "teacher.layers.0–3" in details.text
    assert "(2, 16, 24)" in details.text
    assert (
        shown.row(LINE).find_element(By.TAG_NAME, "button").get_attribute("aria-expanded") == "true"
    )
    shown.row(LINE).find_element(By.CSS_SELECTOR, "code").click()
    assert not shown.all(".details")


def test_a_phase_changes_every_figure(opened, page):
    shown = opened()
    of_phases = {}
    for phase in ("student forward", "backward", "update"):
        shown.find(f"#phases input[value='{phase_number(shown, phase)}']").click()
        total = page.ledger["totals"]["phases"][phase]
        assert shown.status().startswith(f"{total['operations']:,} of ")
        of_phases[phase] = calls(shown.row(LINE))
    assert of_phases["update"] == 0
    assert of_phases["student forward"] != of_phases["backward"] > 0
    assert calls(shown.row(line_of("train.py", "optimizer.step()"))) > 0
    shown.find("#phases input[value=all]").click()
    assert calls(shown.row(LINE)) > sum(of_phases.values())  # the teacher's
    assert shown.find("#by-phase tbody tr").text.startswith("teacher forward")


def phase_number(shown, phase: str) -> int:
    return shown.run("return ledger.phases.indexOf(arguments[0])", phase)


def test_a_line_alone_or_with_what_it_calls(opened, page):
    shown = opened()
    student = line_of("train.py", "learnt = student(")
    assert calls(shown.row(student)) > 0
    with_calls = calls(shown.row(LINE))
    shown.find("#counts input[value=own]").click()
    assert calls(shown.row(student)) == 0
    alone = [stack for stack, lines in enumerate(page.ledger["stacks"]) if lines[0] == LINE]
    expected = sum(entry["stack"] in alone for entry in page.ledger["operations"])
    assert calls(shown.row(LINE)) == expected < with_calls
    total = shown.run("return [...places.values()].reduce((n, l) => n + (l.total?.calls ?? 0), 0)")
    assert total == len(page.ledger["operations"])


def test_a_module_filters(opened, page):
    shown = opened()
    shown.run("treeItems.get('student.layers').querySelector('.leaf').click()")
    there = [e for e in page.ledger["operations"] if e["module"].startswith("student.layers.")]
    assert shown.status().startswith(f"{len(there):,} of ")
    assert shown.find("#unfilter").text == "student.layers ×"
    teacher = line_of("train.py", "taught = teacher(")
    assert calls(shown.row(teacher)) == 0
    shown.find("#unfilter").click()
    assert not shown.find("#unfilter").is_displayed()
    assert calls(shown.row(teacher)) > 0
    (kind,) = [b for b in shown.all("#by-kind button") if b.text == "_VocabularyLoss"]
    kind.click()
    assert shown.find("#unfilter").text == "_VocabularyLoss ×"
    assert calls(shown.row(LINE)) == 0
    assert shown.focused().text == "_VocabularyLoss"


def test_the_tree_by_keys(opened):
    shown = opened()
    shown.run("treeItems.get(null).focus()")
    shown.press(Keys.ARROW_DOWN)
    assert shown.focused().get_attribute("aria-label") == "student"
    shown.press(Keys.ARROW_RIGHT)
    shown.press(Keys.END)
    assert shown.focused().get_attribute("aria-label") == "no module"
    shown.press(Keys.HOME, Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    assert shown.focused().get_attribute("aria-expanded") == "false"
    shown.press(Keys.ARROW_DOWN)
    assert shown.focused().get_attribute("aria-label") == "teacher"
    shown.press(Keys.ENTER)
    assert shown.focused().get_attribute("aria-selected") == "true"
    assert shown.find("#unfilter").text == "teacher ×"
    shown.press(Keys.ESCAPE)
    assert not shown.find("#unfilter").is_displayed()


def test_search(opened, page):
    shown = opened()
    shown.press("/")
    assert shown.focused().get_attribute("id") == "search"
    shown.press("once_differentiable")  # in the text of lines that ran nothing
    count = len(shown.all("tr.match"))
    assert count > 3
    assert f"{count} lines" in shown.status()
    shown.press(Keys.ENTER, Keys.ENTER)
    assert shown.status().startswith("2 of ")
    top = shown.run("return document.querySelectorAll('tr.match')[1].getBoundingClientRect().top")
    assert 0 < top < WIDE[1]
    shown.press(Keys.ESCAPE)
    assert not shown.all("tr.match")
    shown.press("/", "native_layer_norm_back")  # the name of an operation, in no line's text
    ran = [e for e in page.ledger["operations"] if "native_layer_norm_back" in e["name"]]
    lines = {page.ledger["stacks"][e["stack"]][0] for e in ran}
    assert len(lines) == 2  # of the embeddings, and of what layers do
    assert {row.get_attribute("id") for row in shown.all("tr.match")} == lines
    shown.press(Keys.ESCAPE)
    shown.press("/", "no such thing")
    assert shown.status().startswith("no line with")


def test_lines_by_keys(opened):
    shown = opened()
    shown.find("#search").click()
    for _ in range(40):  # past files and modules
        shown.press(Keys.TAB)
        if shown.run("return document.activeElement.matches('.ran button')"):
            break
    first = shown.run("return document.activeElement.closest('tr').id")
    assert first.startswith("train.py:")
    shown.press(Keys.ARROW_DOWN)
    second = shown.run("return document.activeElement.closest('tr').id")
    assert int(second.split(":")[1]) > int(first.split(":")[1])
    shown.press(Keys.ENTER)
    assert len(shown.all(".details")) == 1
    shown.press(Keys.ESCAPE)
    assert not shown.all(".details")
    assert shown.run("return document.activeElement.closest('tr').id") == second
    shown.press(Keys.ARROW_UP)
    assert shown.run("return document.activeElement.closest('tr').id") == first
    shown.press(Keys.END)
    assert not shown.run("return document.activeElement.closest('tr').id").startswith("train.py")


def test_out_of_an_open_line_by_keys(opened):
    shown = opened(place=LINE)
    WebDriverWait(shown.browser, 10).until(lambda _: shown.all(".details"))
    shown.press(Keys.TAB)  # to a link in its operations
    assert shown.run("return document.activeElement.closest('.details') !== null")
    shown.press(Keys.ESCAPE)
    assert not shown.all(".details")
    assert shown.run("return document.activeElement.closest('tr').id") == LINE


def test_a_link_leads_to_a_line(opened):
    shown = opened(place=LINE)
    at = "return document.activeElement.closest('tr')?.id"
    wait = WebDriverWait(shown.browser, 10)
    wait.until(lambda _: shown.run(at) == LINE)
    assert shown.find(".details").is_displayed()
    link = shown.find("#worst a")
    goal = link.text
    link.click()
    wait.until(lambda _: shown.run(at) == goal)


def test_the_worst_lines_are_those_of_the_ledger(opened, page):
    shown = opened()
    errors = [float(row.text) for row in shown.all("#worst td:nth-child(4)")]
    assert errors == sorted(errors, reverse=True)
    relative = [e["error"]["relative"] for e in page.ledger["operations"] if e["error"]]
    assert errors[0] == pytest.approx(max(relative), rel=0.06)


def test_on_paper(opened):
    shown = opened(media="print")
    assert not shown.find("#controls").is_displayed()
    assert not shown.find("aside").is_displayed()
    assert shown.row(LINE).is_displayed()
    opened()  # as on a screen again
