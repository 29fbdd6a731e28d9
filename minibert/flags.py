"""How the words behind a flag are read: argparse types, each with its own complaint."""

import json
import math
from argparse import Action, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minibert.errors import InputError
from minibert.files import read_json
from minibert.recipes import RECIPES, Recipe


def number(kind: type, minimum: float, exclusive: bool = False) -> Callable[[str], Any]:
    """An argparse type: a `kind` (int or float) of at least, or above, `minimum`, below 2^63."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # neither above nor below anything
        if not minimum <= value < 2**63 or (exclusive and value == minimum):
            wanted = "a whole number" if kind is int else "a number"
            bound = f"above {minimum}" if exclusive else f"from {minimum} up"
            raise ArgumentTypeError(f"{text!r} is not {wanted} {bound}")
        return value

    return parse


def layer_numbers(text: str) -> tuple[int, ...]:
    """An argparse type: `1,3,5` to (1, 3, 5)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a list of layers such as 1,3,5") from None


def recipe_at(name: str) -> Recipe:
    """An argparse type: the recipe of that name, or the one in the JSON file of that name."""
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if not path.exists():
        raise ArgumentTypeError(f"{name!r} is no file and none of {', '.join(RECIPES)}")
    try:
        settings = read_json(path)
    except InputError as error:
        raise ArgumentTypeError(str(error)) from None
    try:
        return Recipe.from_dict(path.name, settings)
    except InputError as error:
        raise ArgumentTypeError(f"{path}: {error}") from None


class PrintRecipe(Action):
    """An argparse action: print a recipe as `--recipe` reads it, and end."""

    def __call__(self, parser, namespace, name, option_string=None):
        print(json.dumps(RECIPES[name].to_dict(), indent=2))
        parser.exit()


METAVARS = {Path: "PATH", layer_numbers: "I,J,...", recipe_at: "NAME"}
