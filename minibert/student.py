"""A student for a teacher: some of its layers, embeddings and head, copied; or one drawn anew.

The teacher layers that start the student supervise it later, one each. A student of another width
is compared with its teacher through one projection, which is trained with it and then left behind.

Shapes: B batch, S sequence, H hidden.
"""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from minibert.config import BertConfig
from minibert.errors import InputError
from minibert.folder import empty_model
from minibert.model import BertForMaskedLM, Linear, MaskedLMOutput
from minibert.recipes import Recipe
from minibert.run_config import RunConfig


def one_of_each_group(num_teacher_layers: int, num_groups: int, which: str) -> tuple[int, ...]:
    """The first or last layer of each of `num_groups` groups of consecutive layers.

    The last of six groups of twelve layers are 1, 3, 5, 7, 9, 11, as CompactBioBERT was made: so
    the student's last layer begins as the teacher's last, which its head was trained on.
    """
    if num_teacher_layers % num_groups != 0:
        raise InputError(
            f"the teacher has {num_teacher_layers} layers, which do not make {num_groups} groups "
            f"of one size; say with --teacher-layers which of them make the student"
        )
    size = num_teacher_layers // num_groups
    offset = {"first": 0, "last": size - 1}[which]
    return tuple(range(offset, num_teacher_layers, size))


def layers_to_follow(
    recipe: Recipe, num_teacher_layers: int, chosen: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The teacher's layers that start and supervise the student's: `chosen`, or by the recipe.

    InputError where they are not of the teacher, or not one for each layer of the student.
    """
    half = (num_teacher_layers + 1) // 2
    num_student_layers = recipe.student.get("num_hidden_layers", len(chosen or ()) or half)
    if chosen is None:
        return one_of_each_group(num_teacher_layers, num_student_layers, recipe.layer_of_group)
    _check_layers(chosen, num_teacher_layers)
    if len(chosen) != num_student_layers:
        raise InputError(
            f"teacher layers {','.join(map(str, chosen))}; expected {num_student_layers} of them, "
            f"one for each layer of recipe {recipe}'s student"
        )
    return tuple(chosen)


def _check_layers(layers: Sequence[int], num_teacher_layers: int) -> None:
    ascending = all(below < above for below, above in pairwise(layers))
    if not layers or not ascending or layers[0] < 0 or layers[-1] >= num_teacher_layers:
        raise InputError(
            f"teacher layers {','.join(map(str, layers))}; "
            f"expected ascending numbers from 0 to {num_teacher_layers - 1}, each once"
        )


def student_from_teacher(
    teacher: BertForMaskedLM, teacher_layers: Sequence[int]
) -> BertForMaskedLM:
    """A new model whose layer i is a copy of the teacher's layer `teacher_layers[i]`.

    Nothing is shared with the teacher, and training the student leaves it as it is. Raises
    InputError unless the layers are of the teacher and in ascending order.
    """
    _check_layers(teacher_layers, teacher.config.num_hidden_layers)
    config = dataclasses.replace(teacher.config, num_hidden_layers=len(teacher_layers))
    student = empty_model(BertForMaskedLM, config)
    parts = {"embeddings": teacher.embeddings, "head": teacher.head}
    parts |= {f"layers.{i}": teacher.layers[number] for i, number in enumerate(teacher_layers)}
    copies = {
        f"{part}.{name}": tensor.detach().clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    student.load_state_dict(copies, assign=True)  # strict: every tensor filled, none left over
    return student.requires_grad_(True)


class ProjectedStudent(nn.Module):
    """A student whose hidden states are seen in its teacher's width, through one linear map.

    For training: optimiser and checkpoint have the projection with the student. What is evaluated
    and written in the end is `student` (`without_projection`).
    """

    def __init__(self, student: BertForMaskedLM, teacher_width: int):
        super().__init__()
        self.student = student
        self.projection = Linear(student.config.hidden_size, teacher_width)
        nn.init.normal_(self.projection.weight, std=student.config.initializer_range)
        nn.init.zeros_(self.projection.bias)

    def forward(self, *inputs: Any, **settings: Any) -> MaskedLMOutput:
        """As the student's, with embedding_output and hidden_states (B, S, teacher's H)."""
        output: MaskedLMOutput = self.student(*inputs, **settings)
        return output._replace(
            embedding_output=self.projection(output.embedding_output),
            hidden_states=tuple(self.projection(state) for state in output.hidden_states),
        )

    @property
    def config(self) -> BertConfig:
        return self.student.config

    @property
    def decoder(self) -> Tensor:
        return self.student.decoder

    @property
    def decoder_bias(self) -> Tensor:
        return self.student.decoder_bias


Student = BertForMaskedLM | ProjectedStudent


def without_projection(student: Student) -> BertForMaskedLM:
    """The model itself, which knows nothing of its teacher's width."""
    return student.student if isinstance(student, ProjectedStudent) else student


def new_student(teacher: BertForMaskedLM, run: RunConfig) -> Student:
    """As the run's recipe says, one layer for each of `run.teacher_layers`.

    With a projection where hidden states are to be compared that are not of one width. InputError
    where the student's sizes do not go together, or not with the teacher's.
    """
    if run.recipe.start == "teacher":
        return student_from_teacher(teacher, run.teacher_layers)
    sizes = run.recipe.student | {"num_hidden_layers": len(run.teacher_layers)}
    torch.manual_seed(run.seed)
    try:
        student = BertForMaskedLM(dataclasses.replace(teacher.config, **sizes))
    except InputError as error:
        raise InputError(f"recipe {run.recipe}: {error}") from None
    heads, teacher_heads = (m.config.num_attention_heads for m in (student, teacher))
    if run.attention_pairs and heads != teacher_heads:
        raise InputError(
            f"recipe {run.recipe}: num_attention_heads {heads}; the teacher has {teacher_heads}, "
            f"and attention maps are compared head by head"
        )
    if run.hidden_pairs and student.config.hidden_size != teacher.config.hidden_size:
        return ProjectedStudent(student, teacher.config.hidden_size)
    return student
