"""What a teacher and its student look at: attention maps, and how near the layers are.

Always the plain formulas, in float32, without dropout.

Shapes: B batch, S sequence, N heads, L the student's layers.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minibert.data.batches import Batches
from minibert.data.corpus import Corpus
from minibert.data.tokenizer import Tokenizer
from minibert.errors import InputError
from minibert.evaluate import PROBE, check_fit
from minibert.files import read_json, sha256_of_files
from minibert.fill_mask import load_for_filling
from minibert.folder import CONFIG, WEIGHTS, is_model_folder
from minibert.model import BertForMaskedLM
from minibert.ops.plain import attention_map_loss, attention_scores, hidden_state_loss
from minibert.progress import counted
from minibert.recipes import RECIPES
from minibert.run_config import RunConfig
from minibert.student import (
    new_student,
    one_of_each_group,
    student_from_teacher,
    without_projection,
)

Tokens = tuple[Tensor, Tensor]  # input_ids and attention_mask (1 = real), both (B, S)


class Pair(NamedTuple):
    """A student, its teacher, and which layer follows which."""

    teacher: BertForMaskedLM
    before: BertForMaskedLM | None  # the student as it started; None where that cannot be known
    after: BertForMaskedLM
    layers: tuple[int, ...]  # the teacher's, one for each of the student's
    tokenizer: Tokenizer

    @property
    def num_positions(self) -> int:
        """Tokens that both can read at once."""
        models = (self.teacher, self.after)
        return min(model.config.max_position_embeddings for model in models)


class Nearness(NamedTuple):
    """How near a student is to its teacher, layer by layer: L figures each, or none."""

    cosine: list[float] | None  # of hidden states, the mean over tokens; None: of several widths
    attention_kl: list[float] | None  # nats, the mean over rows and heads; None: of several heads
    num_tokens: int


def load_pair(student: Path, teacher: Path | None = None) -> Pair:
    """A student's folder and its teacher's, as the run tells that the student lies in.

    Where it lies in none, `teacher` is needed, and the student counts as made by the rule of
    CompactBioBERT. Raises InputError for models that do not go together.
    """
    run = run_around(student)
    if teacher is None and (run is None or run.teacher is None):
        why = "lies in no run that names one" if run is None else f"learnt without, by {run.recipe}"
        raise InputError(f"{student}: --teacher is needed; the model {why}")
    if run is not None and not student.is_dir():
        raise InputError(f"{student}: no such folder; a run has it when it is at its end")
    folder = teacher or run.teacher
    if teacher is None and not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder, the teacher in {student.parent / CONFIG}; "
            f"--teacher tells where it is now"
        )
    after, tokenizer = load_for_filling(student)
    guide, guide_tokenizer = load_for_filling(folder)
    check_same_cut(tokenizer, guide_tokenizer)
    if run is not None and run.recipe.needs_teacher:
        _check_teacher(student.parent / CONFIG, folder)
    return _paired(guide, after, tokenizer, run, student)


def run_around(student: Path) -> RunConfig | None:
    """The settings of the run whose folder a model lies in; None where it is no run's."""
    path = student.absolute().parent / CONFIG
    if not path.is_file() or "run" not in read_json(path):
        return None
    return RunConfig.read(path)


def _check_teacher(path: Path, folder: Path) -> None:
    """Refuse another teacher than the run in config.json at `path` began with."""
    known = read_json(path).get("identity")
    if not isinstance(known, dict) or "teacher" not in known or not is_model_folder(folder):
        return
    if known["teacher"] != sha256_of_files(folder / CONFIG, folder / WEIGHTS):
        raise InputError(f"{folder}: not the teacher that {path} tells of (by SHA-256)")


def _paired(
    teacher: BertForMaskedLM,
    after: BertForMaskedLM,
    tokenizer: Tokenizer,
    run: RunConfig | None,
    source: Path,
) -> Pair:
    """The two, the layers that go together, and the student as it was before."""
    depth, num_layers = (m.config.num_hidden_layers for m in (teacher, after))
    layers = run.teacher_layers if run is not None else None
    if layers is None:
        if num_layers > depth:
            raise InputError(f"{source}: {num_layers} layers; its teacher has {depth}")
        which = RECIPES["compactbiobert"].layer_of_group
        layers = one_of_each_group(depth, num_layers, which)
    if len(layers) != num_layers or max(layers) >= depth:
        raise InputError(
            f"{source}: {num_layers} layers; its run tells of teacher layers "
            f"{','.join(map(str, layers))} of {depth}"
        )
    return Pair(teacher, _as_it_started(teacher, after, layers, run), after, layers, tokenizer)


def _as_it_started(
    teacher: BertForMaskedLM,
    after: BertForMaskedLM,
    layers: tuple[int, ...],
    run: RunConfig | None,
) -> BertForMaskedLM | None:
    """The student before its first update, made again; None where it did not begin like that."""
    if run is not None and not run.recipe.needs_teacher:
        return None
    if run is not None:
        before = without_projection(new_student(teacher, run)).eval()
    else:
        before = student_from_teacher(teacher, layers).eval()
    return before if before.config.to_dict() == after.config.to_dict() else None


def check_same_cut(ours: Tokenizer, theirs: Tokenizer) -> None:
    """Refuse two tokenizers that cut text differently, or number their tokens differently."""
    same_words = ours.vocabulary_sha256 == theirs.vocabulary_sha256
    if not same_words or ours.encode_batch([PROBE]) != theirs.encode_batch([PROBE]):
        what = "cuts text otherwise than" if same_words else "has another vocabulary than"
        raise InputError(f"{ours.source} {what} {theirs.source}")


def sentence(pair: Pair, text: str) -> tuple[Tokens, list[str]]:
    """[CLS] text [SEP] as a batch of one, (1, S), and its tokens in words."""
    tokenizer = pair.tokenizer
    (ids,) = tokenizer.encode_batch([text])
    if not ids:
        raise InputError("--maps: a text without any token")
    if len(ids) + 2 > pair.num_positions:
        raise InputError(
            f"--maps: a text of {len(ids) + 2} tokens with [CLS] and [SEP]; "
            f"the models have {pair.num_positions} positions"
        )
    ids = [tokenizer.cls_id, *ids, tokenizer.sep_id]
    input_ids = torch.tensor([ids])  # (1, S)
    words = [tokenizer.backend.id_to_token(i) or f"[id {i}]" for i in ids]
    return (input_ids, torch.ones_like(input_ids)), words


def held_out_documents(pair: Pair, folder: Path, count: int, max_length: int) -> list[Tokens]:
    """Some held-out documents of a corpus, masked as evaluations see them."""
    corpus = Corpus.open(folder)
    check_same_cut(corpus.tokenizer, pair.tokenizer)
    max_length = min(max_length, pair.num_positions)
    check_fit(folder, pair.after.config, corpus, max_length)
    if not (batches := Batches(corpus, max_length).held_out(count)):
        raise InputError(f"{folder}: no held-out documents")
    return [(batch.input_ids, batch.attention_mask) for batch in batches]


@torch.inference_mode()
def attention_maps(model: BertForMaskedLM, tokens: Tokens, layers: Sequence[int]) -> Tensor:
    """softmax(Q K^T / sqrt(D)) of one text in each of the layers, (len(layers), N, S, S)."""
    encoded = model.encode(*tokens, keep=layers)
    scores = [attention_scores(encoded.queries[i], encoded.keys[i], tokens[1]) for i in layers]
    return torch.cat(scores).softmax(dim=-1)


@torch.inference_mode()
def nearness(
    student: BertForMaskedLM,
    teacher: BertForMaskedLM,
    layers: Sequence[int],
    batches: Iterable[Tokens],
) -> Nearness:
    """Compare student layer i with teacher layer layers[i], over the real tokens of all batches."""
    L, heads = len(layers), student.config.num_attention_heads
    cosine_sums, kl_sums = torch.zeros(2, L, dtype=torch.float64)
    same_width = student.config.hidden_size == teacher.config.hidden_size
    same_heads = heads == teacher.config.num_attention_heads
    num_tokens = 0
    for input_ids, mask in counted(list(batches), "comparing layers"):
        learnt = student.encode(input_ids, mask, keep=range(L))
        taught = teacher.encode(input_ids, mask, keep=layers)
        num_tokens += int(mask.sum())
        for i, j in enumerate(layers):
            states = (learnt.hidden_states[i], taught.hidden_states[j])
            maps = (learnt.queries[i], learnt.keys[i], taught.queries[j], taught.keys[j])
            cosine_sums[i] += mask.sum() - hidden_state_loss(*states, mask) if same_width else 0
            kl_sums[i] += attention_map_loss(*maps, mask) if same_heads else 0
    assert num_tokens > 0 and not math.isnan(kl_sums.sum())
    return Nearness(
        (cosine_sums / num_tokens).tolist() if same_width else None,
        (kl_sums / (num_tokens * heads)).tolist() if same_heads else None,
        num_tokens,
    )
