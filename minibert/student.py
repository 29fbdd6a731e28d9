"""A student made from its teacher: some of its layers, copied; its embeddings and its head, copied.

The same teacher layers that start the student supervise it later, one each.
"""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import torch

from minibert.errors import InputError
from minibert.model import BertForMaskedLM


def every_second_layer(num_teacher_layers: int) -> tuple[int, ...]:
    """The last layer of each pair: 1, 3, 5, 7, 9, 11 of twelve, as CompactBioBERT was made.

    So the student's last layer begins as the teacher's last, which its head was trained on.
    """
    if num_teacher_layers % 2 != 0:
        raise InputError(
            f"the teacher has {num_teacher_layers} layers, an odd number; "
            f"say with --teacher-layers which of them make the student"
        )
    return tuple(range(1, num_teacher_layers, 2))


def student_from_teacher(
    teacher: BertForMaskedLM, teacher_layers: Sequence[int]
) -> BertForMaskedLM:
    """A new model whose layer i is a copy of the teacher's layer `teacher_layers[i]`.

    Nothing is shared with the teacher, and training the student leaves it as it is. Raises
    InputError unless the layers are of the teacher and in ascending order.
    """
    L = teacher.config.num_hidden_layers
    ascending = all(below < above for below, above in pairwise(teacher_layers))
    if not teacher_layers or not ascending or teacher_layers[0] < 0 or teacher_layers[-1] >= L:
        raise InputError(
            f"teacher layers {','.join(map(str, teacher_layers))}; "
            f"expected ascending numbers from 0 to {L - 1}, each once"
        )
    with torch.device("meta"):  # shapes only: every tensor comes from the teacher
        config = dataclasses.replace(teacher.config, num_hidden_layers=len(teacher_layers))
        student = BertForMaskedLM(config)
    parts = {"embeddings": teacher.embeddings, "head": teacher.head}
    parts |= {f"layers.{i}": teacher.layers[number] for i, number in enumerate(teacher_layers)}
    copies = {
        f"{part}.{name}": tensor.detach().clone()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    student.load_state_dict(copies, assign=True)  # strict: every tensor filled, none left over
    return student.requires_grad_(True)
