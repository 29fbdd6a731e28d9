"""One update of the distillation the authors' way: the yardstick of `step.py`.

    loss = MLM + 5 KL(output) + 3 sum over layers of (1 - cosine) + 3 sum over layers of KL(maps)

Written anew from what the paper (Rohanian et al., arXiv 2209.03182) and the authors' scripts do,
with what makes their update cost what it costs: `transformers` models with eager attention that
hand out every map and every hidden state, logits at every position, rows chosen by `masked_select`
from whole tensors, batches padded to the longest text, and a teacher inside the trained module,
whose dropout therefore is on.

Needs `pip install -e ".[bench]"`.

Shapes: B batch, S sequence, N heads, H hidden, V vocabulary, L student layers, T real tokens,
M masked positions.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

from convert_weights import names_of
from minibert.data.batches import MicroBatch
from minibert.model import BertForMaskedLM

MLM_WEIGHT, OUTPUT_WEIGHT, HIDDEN_WEIGHT, ATTENTION_WEIGHT = 1.0, 5.0, 3.0, 3.0
LEARNING_RATE, WEIGHT_DECAY, LARGEST_GRAD_NORM = 5e-4, 1e-4, 1.0
NO_LABEL = -100
EPSILON = 1e-12  # added to probabilities, for after dropout many are exactly 0

transformers.utils.logging.set_verbosity_error()  # it warns that SDPA returns no maps: it is meant


class Terms(NamedTuple):
    """The loss terms, unweighted."""

    mlm_loss: Tensor  # ()
    hidden_loss: Tensor  # (L,)
    attention_loss: Tensor  # (L,)
    output_loss: Tensor  # ()

    def weighted_sum(self) -> Tensor:
        """What is minimised, a scalar."""
        return (
            MLM_WEIGHT * self.mlm_loss
            + OUTPUT_WEIGHT * self.output_loss
            + HIDDEN_WEIGHT * self.hidden_loss.sum()
            + ATTENTION_WEIGHT * self.attention_loss.sum()
        )


class AuthorsWay(nn.Module):
    """Teacher and student as one module; its `train()` reaches the teacher too."""

    def __init__(
        self,
        student: transformers.BertForMaskedLM,
        teacher: transformers.BertForMaskedLM,
        teacher_layers: Sequence[int],
    ):
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.teacher_layers = tuple(teacher_layers)  # student layer i follows teacher_layers[i]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Terms:
        """All (B, S); labels are -100 where nothing is masked."""
        asked = {"output_attentions": True, "output_hidden_states": True}
        learnt = self.student(input_ids, attention_mask=attention_mask, **asked)
        with torch.no_grad():
            taught = self.teacher(input_ids, attention_mask=attention_mask, **asked)
        real = attention_mask.bool()  # (B, S)

        mlm_loss = nn.functional.cross_entropy(
            learnt.logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL
        )
        student_rows = selected(learnt.logits, labels != NO_LABEL)  # (M, V)
        teacher_rows = selected(taught.logits, labels != NO_LABEL)  # (M, V)
        output_loss = nn.functional.kl_div(
            student_rows.log_softmax(-1), teacher_rows.softmax(-1), reduction="batchmean"
        )

        # hidden_states[0] is the embedding output; attentions begin with layer 0.
        hidden_losses, attention_losses = [], []
        compared = zip(self.teacher_layers, self.maps(taught), strict=True)
        for i, (j, taught_map) in enumerate(compared):
            pair = (learnt.hidden_states[i + 1], taught.hidden_states[j + 1])
            hidden_losses.append(cosine_loss(*(selected(hidden, real) for hidden in pair)))
            attention_losses.append(map_loss(learnt.attentions[i], taught_map, real))
        return Terms(
            mlm_loss, torch.stack(hidden_losses), torch.stack(attention_losses), output_loss
        )

    def maps(self, taught) -> list[Tensor]:
        """The teacher's maps that are compared, L of (B, N, S, S).

        A layer with SDPA (`use_sdpa_where_no_map_is_read`) has none; the others keep their order.
        """
        there = [probs for probs in taught.attentions if probs is not None]
        if len(there) == len(self.teacher.bert.encoder.layer):
            return [there[j] for j in self.teacher_layers]
        assert len(there) == len(self.teacher_layers)
        return there


def selected(rows: Tensor, chosen: Tensor) -> Tensor:
    """rows (B, S, any width), chosen (B, S) bool; returns (number chosen, width)."""
    width = rows.shape[-1]
    return torch.masked_select(rows, chosen[..., None].expand_as(rows)).view(-1, width)


def cosine_loss(student_rows: Tensor, teacher_rows: Tensor) -> Tensor:
    """Mean over rows of 1 - cosine; both (T, H). Returns a scalar."""
    same = torch.ones(len(student_rows), device=student_rows.device)
    return nn.functional.cosine_embedding_loss(student_rows, teacher_rows, same)


def map_loss(student_map: Tensor, teacher_map: Tensor, real: Tensor) -> Tensor:
    """KL of two maps after dropout, mean over real query rows, heads and all S columns.

    maps (B, N, S, S), real (B, S) bool. Returns a scalar.
    """
    S = real.shape[1]
    chosen = real[:, None, :, None].expand_as(student_map)
    student_rows = torch.masked_select(student_map, chosen).view(-1, S) + EPSILON  # (N T, S)
    teacher_rows = torch.masked_select(teacher_map, chosen).view(-1, S) + EPSILON  # (N T, S)
    return nn.functional.kl_div(student_rows.log(), teacher_rows, reduction="none").mean()


def build(
    student: BertForMaskedLM,
    teacher: BertForMaskedLM,
    teacher_layers: Sequence[int],
    device: torch.device,
    best: bool = False,
) -> tuple[AuthorsWay, torch.optim.AdamW]:
    """The authors' way from the weights of our models, and its optimiser.

    `best` is what an informed user gets without rewriting the mathematics, in bf16 autocast:
    AdamW as one fused kernel, and SDPA where no map is read. SDPA returns no map, so it cannot be
    had in the student (all its maps are compared) nor in the teacher layers that the student
    follows; it can in the other teacher layers, and nowhere else.
    """
    hf_student, hf_teacher = (to_transformers(model).to(device) for model in (student, teacher))
    if best:
        use_sdpa_where_no_map_is_read(hf_teacher, teacher_layers)
    named = list(hf_student.named_parameters())
    decays = [p for name, p in named if not name.endswith("bias") and "LayerNorm" not in name]
    does_not = [p for name, p in named if name.endswith("bias") or "LayerNorm" in name]
    groups = [
        {"params": decays, "weight_decay": WEIGHT_DECAY},
        {"params": does_not, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True if best else None)
    return AuthorsWay(hf_student, hf_teacher, teacher_layers), optimizer


def to_transformers(model: BertForMaskedLM) -> transformers.BertForMaskedLM:
    """The same model in `transformers`, with weights of its own and eager attention."""
    sizes = dataclasses.asdict(model.config)
    config = transformers.BertConfig(**sizes, attn_implementation="eager")
    twin = transformers.BertForMaskedLM(config)
    ours = model.state_dict()
    names = names_of(model.config.num_hidden_layers)
    there = twin.state_dict().keys()
    twin.load_state_dict({name: ours[names[name]] for name in there})  # copies
    return twin


def use_sdpa_where_no_map_is_read(
    teacher: transformers.BertForMaskedLM, teacher_layers: Sequence[int]
) -> None:
    """Give the layers that no student layer follows `scaled_dot_product_attention`.

    `transformers` reads the choice from each attention's config (version 5).
    """
    sdpa = copy.deepcopy(teacher.config)
    sdpa._attn_implementation = "sdpa"
    for number, layer in enumerate(teacher.bert.encoder.layer):
        if number not in teacher_layers:
            layer.attention.self.config = sdpa


def update(way: AuthorsWay, optimizer: torch.optim.AdamW, batch: MicroBatch, dtype: str) -> Tensor:
    """One update on one padded batch, on the models' device; returns the loss, a scalar.

    dtype "bfloat16" is torch.autocast around models and losses, as a user would have it.
    """
    way.train()
    autocast = torch.autocast(
        batch.input_ids.device.type, torch.bfloat16, enabled=dtype == "bfloat16"
    )
    with autocast:
        terms = way(batch.input_ids, batch.attention_mask, labels_of(batch))
    loss = terms.weighted_sum()
    loss.backward()
    nn.utils.clip_grad_norm_(way.student.parameters(), LARGEST_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def labels_of(batch: MicroBatch) -> Tensor:
    """(B, S): the original id at masked positions, -100 elsewhere."""
    labels = torch.full_like(batch.input_ids, NO_LABEL)  # (B, S)
    labels.view(-1)[batch.masked_positions] = batch.labels
    return labels
