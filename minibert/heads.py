"""Heads for tasks on top of the encoder, and the folder of a fine-tuned model.

Every task is a choice: at each of P places one of C. A tag for each of S tokens (P = S), a class
for a text (P = 1), the first and the last token of an answer (P = 2, C = S). So one loss serves
them all. The computations are those of google-research/bert and of Hugging Face's classes of the
same names, whose logits differ in shape alone: (B, C) for a text, (B, S, 2) for an answer.

Shapes: B batch, S sequence, H hidden, P places, C choices.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from minibert.config import BertConfig
from minibert.errors import InputError
from minibert.files import atomic_folder, read_json, write_json
from minibert.folder import (
    CONFIG,
    WEIGHTS,
    build_model,
    check_tensors,
    fill_folder,
    read_tensors,
    tensor_shapes,
)
from minibert.hugging_face import load_either
from minibert.model import BertModel, Linear
from minibert.ops import plain


class FineTunedModel(BertModel):
    """The encoder with a head for a task; `forward` gives its logits (B, P, C)."""

    def __init__(self, config: BertConfig, num_labels: int):
        super().__init__(config)
        self.num_labels = num_labels

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        dtype: torch.dtype | None = None,
        ops: ModuleType = plain,
    ) -> Tensor:
        """input_ids, attention_mask, token_type_ids (B, S); returns the head's logits.

        The encoder computes in `dtype`, the head in the dtype of the weights.
        """
        encoded = self.encode(input_ids, attention_mask, token_type_ids, dtype=dtype, ops=ops)
        hidden = encoded.hidden_states[-1].to(self.embeddings.word_embeddings.weight.dtype)
        return self.logits(hidden, attention_mask, ops)  # hidden (B, S, H)

    def head_dropout(self) -> float:
        return self.config.hidden_dropout_prob if self.training else 0.0


class BertForTokenClassification(FineTunedModel):
    """A label for each token."""

    def __init__(self, config: BertConfig, num_labels: int):
        super().__init__(config, num_labels)
        self.classifier = Linear(config.hidden_size, num_labels)
        self._initialise(self.classifier)

    def logits(self, hidden: Tensor, attention_mask: Tensor, ops: ModuleType) -> Tensor:
        """hidden (B, S, H), attention_mask (B, S); returns (B, S, C)."""
        return self.classifier(ops.dropout(hidden, self.head_dropout()))  # (B, S, C)


class BertForSequenceClassification(FineTunedModel):
    """A label for the whole text, from what the last layer says at [CLS].

    The pooler starts fresh: BERT's own was trained to tell whether two sentences follow each other,
    and our model folders leave it out.
    """

    def __init__(self, config: BertConfig, num_labels: int):
        super().__init__(config, num_labels)
        self.pooler = Linear(config.hidden_size, config.hidden_size)
        self.classifier = Linear(config.hidden_size, num_labels)
        self._initialise(self.pooler)
        self._initialise(self.classifier)

    def logits(self, hidden: Tensor, attention_mask: Tensor, ops: ModuleType) -> Tensor:
        """hidden (B, S, H), attention_mask (B, S); returns (B, 1, C)."""
        pooled = torch.tanh(self.pooler(hidden[:, :1]))  # (B, 1, H)
        return self.classifier(ops.dropout(pooled, self.head_dropout()))  # (B, 1, C)


class BertForQuestionAnswering(FineTunedModel):
    """The first and the last token of the answer."""

    def __init__(self, config: BertConfig, num_labels: int = 2):
        super().__init__(config, num_labels)
        self.qa_outputs = Linear(config.hidden_size, num_labels)
        self._initialise(self.qa_outputs)

    def logits(self, hidden: Tensor, attention_mask: Tensor, ops: ModuleType) -> Tensor:
        """hidden (B, S, H), attention_mask (B, S); returns (B, 2, S).

        No answer begins or ends in the padding: -inf there, so its amount changes nothing.
        """
        logits = self.qa_outputs(hidden).transpose(1, 2)  # (B, 2, S)
        return logits.masked_fill(attention_mask[:, None, :] == 0, -torch.inf)


BOUNDS = ("first", "last")  # what an answer's two logits stand for: config.json does not name them
HEADS = (BertForTokenClassification, BertForSequenceClassification, BertForQuestionAnswering)


def with_new_head(
    head: type[FineTunedModel], num_labels: int, model_folder: Path
) -> FineTunedModel:
    """The encoder of a folder, ours or Hugging Face's, under a head drawn by torch's generator."""
    if head_of(model_folder) is not None:
        raise InputError(f"{model_folder}: fine-tuned already; expected a model that is not")
    encoder, _ = load_either(model_folder)
    model = head(encoder.config, num_labels)
    tensors = model.state_dict()
    tensors |= {name: t for name, t in encoder.state_dict().items() if name in tensors}
    model.load_state_dict(tensors)
    return model


class FineTunedFolder(NamedTuple):
    """What the folder of a fine-tuned model holds, as it is stored."""

    model_class: type[FineTunedModel]
    config: BertConfig
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    label_settings: dict[str, object]  # the part of config.json that names the labels


def head_of(folder: Path) -> type[FineTunedModel] | None:
    """The class of a fine-tuned model's folder; None where it is another one's."""
    if not (folder / CONFIG).is_file():
        return None
    named = read_json(folder / CONFIG).get("architectures")
    return next((head for head in HEADS if named == [head.__name__]), None)


def save_fine_tuned(
    folder: Path, model: FineTunedModel, labels: Sequence[str], tokenizer_from: Path
) -> None:
    """Write a model folder whose config.json names the labels as Hugging Face's does."""
    settings: dict[str, object] = {}
    if not isinstance(model, BertForQuestionAnswering):
        settings["id2label"] = {str(number): label for number, label in enumerate(labels)}
        settings["label2id"] = {label: number for number, label in enumerate(labels)}
    if isinstance(model, BertForSequenceClassification):
        settings["problem_type"] = "single_label_classification"
    with atomic_folder(folder) as partial:
        fill_folder(partial, model.state_dict(), model.config, type(model), tokenizer_from)
        write_json(partial / CONFIG, read_json(partial / CONFIG) | settings)


def read_fine_tuned(folder: Path) -> FineTunedFolder:
    """Read the folder of a fine-tuned model without changing a bit of it."""
    head = head_of(folder)
    if head is None:
        raise InputError(f"{folder}: expected a model that minibert.finetune wrote")
    config, settings = BertConfig.read(folder / CONFIG), read_json(folder / CONFIG)
    tensors, metadata = read_tensors(folder / WEIGHTS)
    named = settings.get("id2label", BOUNDS)
    if not isinstance(named, dict | tuple) or not named:
        raise InputError(f"{folder / CONFIG}: id2label names no labels")
    expected = tensor_shapes(partial(head, num_labels=len(named)), config)
    check_tensors(tensors, expected, folder / WEIGHTS)
    keys = ("id2label", "label2id", "problem_type")
    label_settings = {key: settings[key] for key in keys if key in settings}
    return FineTunedFolder(head, config, tensors, metadata, label_settings)


def load_fine_tuned(folder: Path) -> FineTunedModel:
    """A fine-tuned model, in float32 and eval mode; InputError as `read_fine_tuned`."""
    head, config, tensors, _, label_settings = read_fine_tuned(folder)
    num_labels = len(label_settings.get("id2label", BOUNDS))
    return build_model(partial(head, num_labels=num_labels), config, tensors, folder / WEIGHTS)
