"""Runs of every recipe on the toy world."""

import dataclasses

from minibert.recipes import RECIPES, Recipe
from minibert.run_config import RunConfig

# Groups of two of the toy teacher's four layers; its three heads.
TOY_STUDENT = {"num_hidden_layers": 2, "hidden_size": 18, "intermediate_size": 31}
OF_A_RECIPE = (
    "mlm_weight", "hidden_weight", "attention_weight", "output_weight", "temperature",
    "weight_decay",
)  # fmt: skip


def toy_recipe(name: str) -> Recipe:
    """The recipe; tinybiobert's student is of toy size."""
    recipe = RECIPES[name]
    return dataclasses.replace(recipe, student=TOY_STUDENT) if recipe.student else recipe


def run_of(name: str, toy_run: RunConfig, **settings) -> RunConfig:
    """The toy run with another recipe's losses; `mlm` goes on with the teacher."""
    source = {} if name != "mlm" else {"teacher": None, "model": toy_run.teacher}
    source |= dict.fromkeys(OF_A_RECIPE) | {"teacher_layers": None, "recipe": toy_recipe(name)}
    return dataclasses.replace(toy_run, **source | settings).resolved()
