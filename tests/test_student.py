"""A student is its teacher's chosen layers, embeddings and head, and shares nothing with it."""

import dataclasses

import pytest
import torch
from conftest import TOY_CONFIG

from minibert.errors import InputError
from minibert.model import BertForMaskedLM
from minibert.recipes import RECIPES
from minibert.student import layers_to_follow, student_from_teacher


def teacher_of(depth: int) -> BertForMaskedLM:
    torch.manual_seed(depth)
    config = dataclasses.replace(TOY_CONFIG, num_hidden_layers=depth)
    teacher = BertForMaskedLM(config).eval().requires_grad_(False)
    teacher.head.decoder_bias.normal_()  # it begins at 0: a copy of it must be seen
    return teacher


@pytest.mark.parametrize(
    ("depth", "layers"),
    [
        (12, (1, 3, 5, 7, 9, 11)),
        (24, (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23)),
        (12, (2, 5, 8, 11)),
        (3, (0, 1, 2)),
    ],
)
def test_every_tensor_is_the_teachers(depth, layers):
    teacher = teacher_of(depth)
    student = student_from_teacher(teacher, layers)
    theirs = teacher.state_dict()
    assert student.config.num_hidden_layers == len(layers)
    for name, tensor in student.state_dict().items():
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            name = f"layers.{layers[int(number)]}.{rest}"
        assert torch.equal(tensor, theirs[name]), name


def test_nothing_is_shared():
    teacher = teacher_of(4)
    student = student_from_teacher(teacher, (1, 3))
    storage = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert storage.isdisjoint(parameter.data_ptr() for parameter in student.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_all_layers_make_the_teacher_again():
    teacher = teacher_of(3)
    student = student_from_teacher(teacher, (0, 1, 2)).eval()
    input_ids = torch.arange(14).view(2, 7)
    inputs = (input_ids, torch.ones_like(input_ids))
    assert torch.equal(student(*inputs).head_output, teacher(*inputs).head_output)


@pytest.mark.parametrize(
    ("recipe", "depth", "layers"),
    [
        ("compactbiobert", 12, (1, 3, 5, 7, 9, 11)),
        ("compactbiobert", 24, tuple(range(1, 24, 2))),
        ("distilbiobert", 12, (0, 2, 4, 6, 8, 10)),
        ("tinybiobert", 12, (2, 5, 8, 11)),
        ("tinybiobert", 4, (0, 1, 2, 3)),
    ],
)
def test_the_layers_of_a_recipe(recipe, depth, layers):
    assert layers_to_follow(RECIPES[recipe], depth) == layers


@pytest.mark.parametrize(
    ("recipe", "depth", "groups"),
    [("compactbiobert", 11, 6), ("distilbiobert", 3, 2), ("tinybiobert", 10, 4)],
)
def test_layers_that_do_not_divide_are_refused(recipe, depth, groups):
    with pytest.raises(InputError, match=f"{depth} layers, which do not make {groups} groups"):
        layers_to_follow(RECIPES[recipe], depth)


def test_layers_can_be_chosen():
    assert layers_to_follow(RECIPES["distilbiobert"], 11, (2, 3, 9)) == (2, 3, 9)
    assert layers_to_follow(RECIPES["tinybiobert"], 11, (0, 2, 3, 9)) == (0, 2, 3, 9)
    complaint = "2,3,9; expected 4 of them, one for each layer of recipe tinybiobert's student"
    with pytest.raises(InputError, match=complaint):
        layers_to_follow(RECIPES["tinybiobert"], 11, (2, 3, 9))


@pytest.mark.parametrize("layers", [(), (0, 4), (-1, 2), (2, 1), (1, 1)])
def test_layers_that_do_not_fit_are_refused(layers):
    with pytest.raises(InputError, match="expected ascending numbers from 0 to 3"):
        student_from_teacher(teacher_of(4), layers)
    with pytest.raises(InputError, match="expected ascending numbers from 0 to 3"):
        layers_to_follow(RECIPES["compactbiobert"], 4, layers)
