"""`minibert.fill_mask` finds the words that transformers finds, for any texts, any number of them.

Against two oracles: transformers' pipeline, and each text computed alone, by the definition.
"""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TOY_CONFIG
from hugging_face_toys import save_toy, toy_model, transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import minibert
import minibert.fill_mask as command
from minibert.errors import InputError, run_command
from minibert.fill_mask import fill_masks
from minibert.folder import save_model
from minibert.model import BertForMaskedLM, BertModel

ROOM = TOY_CONFIG.max_position_embeddings - 2  # tokens of a text beside [CLS] and [SEP]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A Hugging Face folder of the toy model."""
    return save_toy(tmp_path_factory.mktemp("fill") / "hf", toy_model())


@pytest.fixture(scope="module")
def pretrained(toy):
    return minibert.load(toy)


def assert_as_the_pipeline(pretrained, theirs, tokenizer, texts, top):
    """Same tokens, probabilities to 1e-5; our texts all at once, theirs one by one."""
    pipeline = transformers.pipeline("fill-mask", model=theirs, tokenizer=tokenizer, device="cpu")
    for text, found in zip(texts, fill_masks(*pretrained, texts, top), strict=True):
        expected = pipeline(text, top_k=top)
        if text.count("[MASK]") == 1:
            expected = [expected]
        assert len(found) == text.count("[MASK]")
        for guesses, answers in zip(found, expected, strict=True):
            ids = [pretrained.tokenizer.backend.token_to_id(guess.token) for guess in guesses]
            assert ids == [answer["token"] for answer in answers]
            probabilities = [answer["score"] for answer in answers]
            assert [guess.probability for guess in guesses] == pytest.approx(
                probabilities, abs=1e-5
            )


def test_the_words_are_those_of_the_pipeline(toy, pretrained):
    texts = [
        "w01 w02 [MASK] w04",
        "[MASK]",
        "[MASK][MASK] w05 [MASK].",
        "w07 unheard-of [MASK]w09",
        " ".join(["w11 [MASK]"] * 13),
        "[MASK] w90",
    ]
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(toy)
    tokenizer = transformers.BertTokenizer(str(toy / "vocab.txt"), do_lower_case=False)
    assert_as_the_pipeline(pretrained, theirs, tokenizer, texts, top=7)


def test_a_trained_model_with_its_own_tokenizer(shared_data):
    folder = shared_data / "rxnfp"
    texts = []
    with open(folder / "uspto50k_eval_test_reactions.txt") as file:
        for number, line in zip(range(12), file, strict=False):
            line = line.strip()
            place = 3 + 2 * number
            texts.append(line[:place] + "[MASK]" + line[place + 1 :])
    texts[5] += "[MASK]"
    theirs = transformers.BertForMaskedLM.from_pretrained(folder)
    special = {name + "_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep")}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), mask_token="[MASK]", **special
    )
    pretrained = minibert.load(folder)
    assert_as_the_pipeline(pretrained, theirs, tokenizer, texts, top=5)
    ((oxygen,),) = fill_masks(*pretrained, ["CC(=O)O.CC[MASK]>>CC(=O)OCC"], top=1)
    assert oxygen[0].token == "O"  # an alcohol makes the ester
    assert oxygen[0].probability > 0.9


def alone(pretrained, text: str) -> list[torch.Tensor]:
    """By the definition: the distribution (V,) for each mask of one text, each computed alone."""
    model, tokenizer = pretrained
    ids, masks = [], []
    for part in text.replace("[MASK]", "\0[MASK]\0").split("\0"):
        if part == "[MASK]":
            masks.append(len(ids))
            ids.append(tokenizer.mask_id)
        else:
            (pieces,) = tokenizer.encode_batch([part])
            ids += pieces
    distributions = []
    for mask in masks:
        starts = range(max(1, len(ids) - ROOM + 1))  # of all windows: the mask in the middle
        start = min(starts, key=lambda start: abs(mask - start - ROOM // 2))
        window = [tokenizer.cls_id, *ids[start : start + ROOM], tokenizer.sep_id]
        input_ids = torch.tensor([window])
        output = model(input_ids, torch.ones_like(input_ids))
        distributions.append(model.logits(output.head_output)[1 + mask - start].softmax(dim=-1))
    return distributions


def assert_as_alone(pretrained, texts: list[str], top: int) -> None:
    """All texts at once give what each of them gives alone."""
    backend = pretrained.tokenizer.backend
    found = fill_masks(*pretrained, texts, top)
    assert len(found) == len(texts)
    for text, masks in zip(texts, found, strict=True):
        for guesses, expected in zip(masks, alone(pretrained, text), strict=True):
            probabilities = [guess.probability for guess in guesses]
            assert probabilities == pytest.approx(expected.topk(min(top, 99)).values, abs=1e-5)
            ids = [backend.token_to_id(guess.token) for guess in guesses]
            assert probabilities == pytest.approx(expected[ids], abs=1e-5)


words = st.sampled_from(["w00", "w17", "w93", "[MASK]", "[PAD]", "[SEP]", "##s", "naïve", "中文"])
texts = st.lists(st.one_of(words, st.text(max_size=5)), max_size=45).map(" ".join)


@given(st.lists(texts, max_size=6), st.integers(1, 120))
@example(["", "[MASK]", "[MASK]" * (ROOM + 9)], 3)
@example(["[MASK]" + " w01" * n + "[MASK]" for n in range(ROOM - 4, ROOM + 2)], 3)
@example(["[MASK][MASK", "[MASK] [CLS] [PAD] [SEP]", "[[MASK]]", "[mask]"], 5)
@example(["w01 " * (ROOM - 1) + "[MASK]", "[MASK]" + " w01" * ROOM, "w1 " * 500 + "[MASK]"], 99)
@example(["w01 " * n + "[MASK]" + " w02" * (60 - n) for n in range(0, 60, 7)], 2)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_texts_together_give_what_each_gives_alone(pretrained, some, top):
    some = [text.replace("\0", "") for text in some]
    assert_as_alone(pretrained, some, top)


def test_more_masks_than_fit_into_memory_at_once(pretrained, monkeypatch):
    monkeypatch.setattr(command, "WINDOWS_AT_ONCE", 7)
    monkeypatch.setattr(command, "MASKS_AT_ONCE", 3)
    monkeypatch.setattr(command, "BATCH_TOKENS", 20)
    long = " ".join(f"[MASK] w{number:02}" for number in range(40))
    assert_as_alone(pretrained, ["w01 [MASK]", long, "[MASK]w02 [MASK] w03 [MASK] w04 [MASK]"], 4)


def test_padding_counts_as_tokens_of_a_batch():
    lengths = [3, 29, 17, 3, 500, 3000, 4, 29] * 40
    windows = [command.Window(n, 0, [7] * length, [1]) for n, length in enumerate(lengths)]
    batches = list(command._batches(windows))
    assert sorted(window for batch in batches for window in batch) == windows
    assert len(batches) == 40 + 10 + 1 + 1 + 1  # 40 of 3000 tokens, 4 of 500 each, few of others
    for batch in batches:
        padded = len(batch) * max(len(window.input_ids) for window in batch)
        assert padded <= command.BATCH_TOKENS or len(batch) == 1


def test_a_row_that_is_no_token_has_a_name(toy_world, tmp_path):
    """A vocabulary that is rounded up: the model may guess what no word stands for."""
    words = (toy_world / "vocab.txt").read_text().split("\n")[:90]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    save_model(tmp_path / "model", BertForMaskedLM(TOY_CONFIG), tokenizer_from=tmp_path)
    ((guesses,),) = fill_masks(*minibert.load(tmp_path / "model"), ["[MASK]"], top=99)
    names = {guess.token for guess in guesses}
    assert len(names) == 99
    assert {name for name in names if name.startswith("[id")} == {
        f"[id {n}]" for n in range(90, 99)
    }


def filled(monkeypatch, capsys, *arguments, lines: bytes | None = None) -> tuple[int, str, str]:
    """Run the command; returns its status and what it wrote to the two outputs."""
    monkeypatch.setattr(sys, "argv", ["fill_mask", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines or b"")))
    status = run_command(command.main)
    return status, *capsys.readouterr()


def test_what_people_see(toy, pretrained, monkeypatch, capsys):
    texts = ["w01 [MASK] w03", "[MASK] w02 [MASK]"]
    ((first,), (second, third)) = fill_masks(*pretrained, texts, top=2)
    status, printed, complaint = filled(monkeypatch, capsys, toy, *texts, "--top", 2)
    assert (status, complaint) == (0, "")
    block = "".join(
        f"{title}\n" + "".join(f"  {guess.probability:.4f}  {guess.token}\n" for guess in guesses)
        for title, guesses in [
            (texts[0], first),
            (f"{texts[1]}\n[MASK] 1 of 2", second),
            ("[MASK] 2 of 2", third),
        ]
    )
    assert printed == block


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_a_line_of_standard_input_is_a_line_of_json(
    arguments, toy, pretrained, monkeypatch, capsys
):
    texts = [f"w{number % 94:02} [MASK]" + " [MASK]" * (number % 3) for number in range(300)]
    texts[7] = "w01\u2028[MASK]\x85 naïve"  # which is one line
    lines = "\r\n".join(texts).encode()
    status, printed, complaint = filled(monkeypatch, capsys, toy, *arguments, "--json", lines=lines)
    assert (status, complaint) == (0, "")
    found = [json.loads(line) for line in printed.splitlines()]
    assert [entry["text"] for entry in found] == texts
    for entry, masks in zip(found, fill_masks(*pretrained, texts), strict=True):
        assert len(entry["masks"]) == len(masks)
        for answers, guesses in zip(entry["masks"], masks, strict=True):
            assert [tuple(answer.values()) for answer in answers] == [
                (token, pytest.approx(probability, abs=1e-5)) for token, probability in guesses
            ]


def test_no_lines_need_no_answer(toy, monkeypatch, capsys):
    assert filled(monkeypatch, capsys, toy, lines=b"") == (0, "", "")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"w01 [mask]", "no [MASK] in 'w01 [mask]'"),
        (b"", "no [MASK] in ''"),
        (b"w" * 900, f"no [MASK] in '{'w' * 100}...'"),
        (b"w01 \xff [MASK]", "not UTF-8 text (byte 4)"),
    ],
)
def test_a_line_that_cannot_be_filled_ends_it(line, reason, toy, monkeypatch, capsys):
    """When the lines before it have been answered."""
    lines = b"[MASK] w01\n" * 130 + line + b"\n[MASK]\n"
    status, printed, complaint = filled(monkeypatch, capsys, toy, "--json", lines=lines)
    assert status == 2
    assert len(printed.splitlines()) == 130
    assert complaint == f"error: line 131 of standard input: {reason}\n"


def test_a_text_that_cannot_be_filled_is_one_clear_line(toy, monkeypatch, capsys):
    status, _, complaint = filled(monkeypatch, capsys, toy, "[MASK]", "w01 [MASK ]")
    assert (status, complaint) == (2, "error: text 2: no [MASK] in 'w01 [MASK ]'\n")
    status, _, complaint = filled(monkeypatch, capsys, toy, "\udcff [MASK]")
    assert (status, complaint) == (2, "error: text 1: not UTF-8 text (byte 0)\n")


def test_a_terminal_is_not_waited_for(toy, monkeypatch, capsys):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "argv", ["fill_mask", str(toy)])
    for nothing in (Terminal(io.BytesIO(b"[MASK]\n")), None):
        monkeypatch.setattr(sys, "stdin", nothing)
        assert run_command(command.main) == 2
        assert capsys.readouterr().err.startswith("error: no text; expected one with a [MASK]")
    typed = Terminal(io.BytesIO(b"[MASK]\nw01 [MASK]\n"))
    monkeypatch.setattr(sys, "stdin", typed)
    assert [len(texts) for texts in command.texts_asked(["-"])] == [1, 1, 0]  # each at once


def test_a_model_that_cannot_fill_masks_is_one_clear_line(tmp_path, monkeypatch, capsys):
    folder = save_toy(tmp_path / "hf", toy_model("BertModel"))
    status, _, complaint = filled(monkeypatch, capsys, folder, "[MASK]")
    expected = f"error: {folder}: an encoder without the masked-language-modelling head\n"
    assert (status, complaint) == (2, expected)
    assert isinstance(minibert.load(folder).model, BertModel)


def test_a_model_of_two_positions_is_told(pretrained, monkeypatch):
    _, tokenizer = pretrained
    sizes = {"hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = TOY_CONFIG.__class__(99, **sizes, intermediate_size=7, max_position_embeddings=2)
    with pytest.raises(InputError, match="the model has 2 positions"):
        fill_masks(BertForMaskedLM(small), tokenizer, ["[MASK]"])
    three = TOY_CONFIG.__class__(99, **sizes, intermediate_size=7, max_position_embeddings=3)
    ((guesses,),) = fill_masks(BertForMaskedLM(three).eval(), tokenizer, ["w01 [MASK] w02"])
    assert len(guesses) == 5


# Standard output as people have it: buffered.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize(
    ("command_line", "seen"),
    [
        ("yes '[MASK] w01' | {command} | head -n 1; echo ${{PIPESTATUS[1]}}", "[MASK] w01\n141\n"),
        # Too little to be noticed before the buffer is written out:
        ("{command} '[MASK]' | true; echo ${{PIPESTATUS[0]}}", "141\n"),
    ],
)
def test_a_closed_pipe_ends_it_quietly(command_line, seen, toy):
    command = f"'{sys.executable}' -m minibert.fill_mask '{toy}'"
    done = subprocess.run(
        ["bash", "-c", command_line.format(command=command)],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.stderr, done.stdout) == ("", seen)


def test_ctrl_c_ends_it_quietly(toy, tmp_path):
    with open(tmp_path / "printed", "wb") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "minibert.fill_mask", str(toy)],
            cwd=ROOT, env=ENVIRONMENT,
            stdin=subprocess.PIPE, stdout=printed, stderr=subprocess.PIPE,
        )  # fmt: skip
    process.stdin.write(b"[MASK] w01\n" * 128)
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not (tmp_path / "printed").stat().st_size and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (tmp_path / "printed").stat().st_size  # it has answered, and waits for more
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (130, b"interrupted\n")
    assert (tmp_path / "printed").read_text().count("[MASK] w01") == 128
