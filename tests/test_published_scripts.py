"""Our terms, total and gradients are those of the authors' definitions, on transformers' modules.

Where their scripts' quirks vanish: no dropout, and every text as long as `max_length`. With shorter
texts too for the terms that their scripts take over real tokens alone.

Shapes: B batch, S sequence, N heads, H hidden, V vocabulary, M masked positions.
"""

import dataclasses
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from recipe_toys import run_of
from torch import Tensor, nn

import convert_weights
import train
from minibert.data.batches import GlobalBatch, MicroBatch
from minibert.data.corpus import Corpus
from minibert.folder import load_model, save_model
from minibert.student import ProjectedStudent, without_projection

transformers = pytest.importorskip("transformers", reason="the definitions need transformers")
transformers.utils.logging.disable_progress_bar()

B, S = 6, 19  # S: max_length of the toy run
WHOLE, SHORTER = [19] * 6, [19, 3, 11, 7, 2, 15]
MASKED_POSITIONS, LABELS = [1, 18, 20, 40, 100], [7, 93, 50, 8, 20]
EXACTNESS = {torch.float32: 1e-5, torch.float64: 1e-9}  # relative; their maps have 1e-12 added


class Terms(NamedTuple):
    """The four terms, and what is minimised."""

    mlm: Tensor
    hidden: Tensor
    attention: Tensor
    output: Tensor
    total: Tensor


# The definitions, from what transformers hands out. hidden_states[0] is the embedding output.


def masked_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (B, S, V), labels (B, S); returns (M, V)."""
    chosen = (labels > -1).unsqueeze(-1).expand_as(logits)
    return torch.masked_select(logits, chosen).view(-1, logits.size(-1))


def real_rows(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """hidden (B, S, H); returns (real tokens, H)."""
    chosen = attention_mask.bool().unsqueeze(-1).expand_as(hidden)
    return torch.masked_select(hidden, chosen).view(-1, hidden.size(-1))


def cosine_loss(student: Tensor, teacher: Tensor, attention_mask: Tensor) -> Tensor:
    rows = [real_rows(hidden, attention_mask) for hidden in (student, teacher)]
    return nn.CosineEmbeddingLoss()(*rows, torch.ones(len(rows[0])))


def map_kl(student: Tensor, teacher: Tensor, attention_mask: Tensor) -> Tensor:
    """maps (B, N, S, S): mean over all elements of the rows of real queries."""
    chosen = attention_mask.bool()[:, None, :, None].expand_as(student)
    student_rows, teacher_rows = (
        torch.masked_select(maps, chosen).view(-1, S) for maps in (student, teacher)
    )
    return nn.KLDivLoss(reduction="none")((student_rows + 1e-12).log(), teacher_rows + 1e-12).mean()


def output_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """rows of logits (M, V)."""
    kl = nn.KLDivLoss(reduction="batchmean")
    student, teacher = student / temperature, teacher / temperature
    return kl(student.log_softmax(-1), teacher.softmax(-1)) * temperature**2


def soft_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """rows of logits (M, V)."""
    return -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1).mean()


def compactbiobert(learnt, taught, attention_mask, labels, projection) -> Terms:
    rows = (masked_rows(learnt.logits, labels), masked_rows(taught.logits, labels))
    mlm = nn.CrossEntropyLoss()(learnt.logits.flatten(0, 1), labels.flatten())
    output = output_kl(*rows, temperature=1)
    hidden, attention = 0, 0
    for i in range(2):  # student layer i, teacher layer 2 i + 1
        pair = (learnt.hidden_states[i + 1], taught.hidden_states[2 * i + 2])
        hidden = hidden + cosine_loss(*pair, attention_mask)
        pair = (learnt.attentions[i], taught.attentions[2 * i + 1])
        attention = attention + map_kl(*pair, attention_mask)
    return Terms(mlm, hidden, attention, output, mlm + 3 * hidden + 3 * attention + 5 * output)


def distilbiobert(learnt, taught, attention_mask, labels, projection) -> Terms:
    rows = (masked_rows(learnt.logits, labels), masked_rows(taught.logits, labels))
    mlm = nn.CrossEntropyLoss()(learnt.logits.flatten(0, 1), labels.flatten())
    output = output_kl(*rows, temperature=2)
    hidden = cosine_loss(learnt.hidden_states[-1], taught.hidden_states[-1], attention_mask)
    return Terms(mlm, hidden, torch.tensor(0.0), output, 2 * mlm + hidden + 5 * output)


def tinybiobert(learnt, taught, attention_mask, labels, projection) -> Terms:
    """Its means are over all elements, padding and all."""
    rows = (masked_rows(learnt.logits, labels), masked_rows(taught.logits, labels))
    mlm = nn.CrossEntropyLoss()(learnt.logits.flatten(0, 1), labels.flatten())
    output = soft_cross_entropy(*rows)
    hidden, attention = 0, 0
    for level in range(3):  # of groups of two layers: the teacher's levels 0, 2, 4
        student_hidden = projection(learnt.hidden_states[level])
        hidden = hidden + F.mse_loss(student_hidden, taught.hidden_states[2 * level])
    for i in range(2):
        attention = attention + F.mse_loss(learnt.attentions[i], taught.attentions[2 * i + 1])
    return Terms(mlm, hidden, attention, output, hidden + attention + output)


PUBLISHED = {
    "compactbiobert": compactbiobert,
    "distilbiobert": distilbiobert,
    "tinybiobert": tinybiobert,
}


# Both sides.


@pytest.fixture
def still_teacher(toy_world, tmp_path):
    """The toy teacher without dropout; no tensor of it constant."""
    teacher = load_model(toy_world / "teacher")
    teacher.config = dataclasses.replace(
        teacher.config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    with torch.no_grad():
        disturb(teacher, seed=7)
    save_model(tmp_path / "teacher", teacher, tokenizer_from=toy_world)
    return tmp_path / "teacher"


def disturb(model: nn.Module, seed: int) -> None:
    """Biases and LayerNorm begin as constants, and a student as its teacher."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def to_transformers(model, vocabulary, folder):
    """The model as transformers opens it from its own kind of folder, with eager attention."""
    save_model(folder / "ours", model, tokenizer_from=vocabulary)
    convert_weights.to_hugging_face(folder / "ours", folder / "theirs")
    return transformers.BertForMaskedLM.from_pretrained(
        folder / "theirs", attn_implementation="eager"
    )


def batch_of(lengths: list[int]) -> GlobalBatch:
    """One micro-batch of six texts with five masked positions, all of them real."""
    generator = torch.Generator().manual_seed(9)
    input_ids = torch.randint(5, 99, (B, S), generator=generator)
    attention_mask = (torch.arange(S) < torch.tensor(lengths)[:, None]).long()
    assert attention_mask.flatten()[MASKED_POSITIONS].all()
    masked_positions, labels = torch.tensor(MASKED_POSITIONS), torch.tensor(LABELS)
    micro_batch = MicroBatch(input_ids, attention_mask, masked_positions, labels)
    return GlobalBatch([micro_batch], list(range(B)), sum(lengths), len(labels))


def our_side(student, teacher, batch, run) -> tuple[Terms, dict[str, Tensor]]:
    """The terms as train.update adds them up, and the gradients by our names."""
    terms = train.loss_terms(student, teacher, batch.micro_batches[0], batch, run)
    total = (
        terms.vocabulary_loss
        + run.hidden_weight * terms.hidden_loss.sum()
        + run.attention_weight * terms.attention_loss.sum()
    )
    total.backward()
    hidden, attention = terms.hidden_loss.sum(), terms.attention_loss.sum()
    gradients = {name: part.grad for name, part in student.named_parameters()}
    return Terms(terms.mlm_loss, hidden, attention, terms.output_loss, total), gradients


def their_side(name, student, teacher, projection, batch) -> tuple[Terms, dict[str, Tensor]]:
    """The same by the definitions, the student's gradients under our names."""
    input_ids, attention_mask, masked_positions, labels, _ = batch.micro_batches[0]
    all_labels = torch.full((B, S), -100)
    all_labels.view(-1)[masked_positions] = labels
    asked = {"output_attentions": True, "output_hidden_states": True}
    learnt = student(input_ids, attention_mask=attention_mask, **asked)
    with torch.no_grad():
        taught = teacher(input_ids, attention_mask=attention_mask, **asked)
    terms = PUBLISHED[name](learnt, taught, attention_mask, all_labels, projection)
    terms.total.backward()
    names = convert_weights.names_of(student.config.num_hidden_layers)
    prefix = "" if projection is None else "student."
    gradients = {prefix + names[name]: part.grad for name, part in student.named_parameters()}
    if projection is not None:
        gradients |= {f"projection.{name}": p.grad for name, p in projection.named_parameters()}
    return terms, gradients


CASES = [
    ("compactbiobert", WHOLE),
    ("distilbiobert", WHOLE),
    ("tinybiobert", WHOLE),
    ("compactbiobert", SHORTER),
    ("distilbiobert", SHORTER),
]


@pytest.mark.parametrize("dtype", EXACTNESS)
@pytest.mark.parametrize("ops", ["plain", "fused"])
@pytest.mark.parametrize(("name", "lengths"), CASES)
def test_terms_total_and_gradients(
    still_teacher, toy_run, toy_world, tmp_path, name, lengths, ops, dtype
):
    run = run_of(name, toy_run, teacher=still_teacher, ops=ops)
    student, teacher, run = train.build_models(run, Corpus.open(run.data), torch.device("cpu"))
    with torch.no_grad():
        disturb(student, seed=8)
    projection = None
    if isinstance(student, ProjectedStudent):
        projection = nn.Linear(18, 24)
        projection.load_state_dict(student.projection.state_dict())
        projection = projection.to(dtype)
    their_student, their_teacher = (
        to_transformers(model, toy_world, tmp_path / kind).to(dtype).eval()
        for kind, model in (("a", without_projection(student)), ("b", teacher))
    )
    student, teacher, batch = student.to(dtype).train(), teacher.to(dtype), batch_of(lengths)

    ours, our_gradients = our_side(student, teacher, batch, run)
    theirs, their_gradients = their_side(name, their_student, their_teacher, projection, batch)
    for term, found, expected in zip(Terms._fields, ours, theirs, strict=True):
        assert found.item() == pytest.approx(expected.item(), rel=EXACTNESS[dtype]), term
    assert theirs.hidden > 0.01 and theirs.output > 0.01
    assert name == "distilbiobert" or theirs.attention > 1e-4
    assert our_gradients.keys() == their_gradients.keys()
    # The gradients as one vector, and each by itself; of a key's bias there is but rounding.
    whole = torch.cat([part.flatten() for part in their_gradients.values()]).norm()
    for parameter, expected in their_gradients.items():
        error = (our_gradients[parameter] - expected).norm()
        assert error <= EXACTNESS[dtype] * (expected.norm() + 1e-2 * whole), parameter


def test_padding_counts_in_their_means_and_not_in_ours(still_teacher, toy_run, toy_world, tmp_path):
    """What TinyBioBERT's means see in padding is not learnt from here."""
    run = run_of("tinybiobert", toy_run, teacher=still_teacher)
    student, teacher, run = train.build_models(run, Corpus.open(run.data), torch.device("cpu"))
    projection = student.projection
    their_student, their_teacher = (
        to_transformers(model, toy_world, tmp_path / kind).eval()
        for kind, model in (("a", student.student), ("b", teacher))
    )
    batch = batch_of(SHORTER)
    ours, _ = our_side(student, teacher, batch, run)
    theirs, _ = their_side("tinybiobert", their_student, their_teacher, projection, batch)
    assert ours.output.item() == pytest.approx(theirs.output.item(), rel=1e-5)
    assert ours.hidden.item() != pytest.approx(theirs.hidden.item(), rel=1e-3)
    assert ours.attention.item() != pytest.approx(theirs.attention.item(), rel=1e-3)
