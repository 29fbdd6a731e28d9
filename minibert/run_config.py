"""What a run was started with.

It is written as JSON into the run's folder. The flags of `train.py` are the fields of `RunConfig`,
one flag a field, so that the two cannot differ.
"""

import dataclasses
import reprlib
from argparse import SUPPRESS, ArgumentTypeError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from minibert.errors import ArgumentParser, InputError
from minibert.files import read_json
from minibert.flags import METAVARS, PrintRecipe, layer_numbers, number, recipe_at
from minibert.recipes import RECIPES, Pairs, Recipe
from minibert.training.device import MICRO_BATCH_TOKENS


def setting(default: Any, help: str, **argparse_options: Any) -> Any:
    """A field of `RunConfig`: its default, its help text and how argparse reads it."""
    return field(default=default, metadata={"help": help} | argparse_options)


@dataclass(frozen=True)
class RunConfig:
    """Everything a run was started with. None: the recipe decides (or it is not used)."""

    recipe: Recipe = setting(
        RECIPES["compactbiobert"],
        f"what is learnt, from which signals: {', '.join(RECIPES)}, or a JSON file",
        type=recipe_at,
    )
    teacher: Path | None = setting(None, "model folder of the teacher", type=Path)
    model: Path | None = setting(
        None, "recipe mlm: model folder to continue, or a config.json to begin at random", type=Path
    )
    data: Path | None = setting(None, "corpus folder made by minibert.prepare", type=Path)
    out: Path | None = setting(None, "run folder to write", type=Path)
    resume: bool = setting(
        False, "go on with the run in --out, or begin it where there is none", action="store_true"
    )
    steps: int | None = setting(None, "updates in all", type=number(int, 1))
    batch_size: int | None = setting(None, "sequences in one update", type=number(int, 1))
    micro_batch_tokens: int | None = setting(
        None,
        "tokens, padding included, that go through the models at once "
        f"(default: {MICRO_BATCH_TOKENS['cpu']}, on a GPU {MICRO_BATCH_TOKENS['cuda']})",
        type=number(int, 1),
    )
    max_length: int | None = setting(None, "tokens of a sequence", type=number(int, 3))
    learning_rate: float | None = setting(
        None, "highest learning rate", type=number(float, 0, exclusive=True)
    )
    warmup_steps: int | None = setting(
        None, "updates of linear warm-up; of other --steps the same share", type=number(int, 0)
    )
    weight_decay: float | None = setting(
        None, "decoupled weight decay, not on biases and LayerNorm", type=number(float, 0)
    )
    teacher_layers: tuple[int, ...] | None = setting(
        None,
        "teacher layers, counted from 0, that start and supervise the student's "
        "(compactbiobert: 1,3,5,7,9,11 of twelve)",
        type=layer_numbers,
    )
    mlm_weight: float | None = setting(None, "weight of the MLM loss", type=number(float, 0))
    hidden_weight: float | None = setting(
        None, "weight of the hidden-state loss", type=number(float, 0)
    )
    attention_weight: float | None = setting(
        None, "weight of the attention-map loss", type=number(float, 0)
    )
    output_weight: float | None = setting(None, "weight of the output loss", type=number(float, 0))
    temperature: float | None = setting(
        None, "temperature of the output loss", type=number(float, 0, exclusive=True)
    )
    seed: int = setting(0, "seed of every random draw", type=number(int, 0))
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = setting(
        "float32",
        "in which the layers compute; weights, moments and loss sums stay float32",
        choices=("float32", "bfloat16"),
    )
    ops: str = setting(
        "fused",
        "attention and losses: plain formulas, or the same functions lean in memory and time",
        choices=("fused", "plain"),
    )
    compile: bool = setting(
        False,
        "torch.compile both models: little to gain beside Triton's kernels; needs a C++ compiler",
        action="store_true",
    )
    eval_every: int = setting(1000, "updates between evaluations", type=number(int, 1))
    eval_documents: int = setting(500, "held-out documents of an evaluation", type=number(int, 1))
    save_every: int = setting(5000, "updates between checkpoints", type=number(int, 1))
    save_minutes: float = setting(
        15.0, "minutes after which a checkpoint is due", type=number(float, 0, exclusive=True)
    )
    max_hours: float | None = setting(
        None,
        "save and end so long after this start, for queues",
        type=number(float, 0, exclusive=True),
    )
    skip_nonfinite: int = setting(
        0, "updates to pass over whose loss or gradient is not finite", type=number(int, 0)
    )
    log_every: int = setting(10, "updates between lines of metrics.jsonl", type=number(int, 1))
    keep: int = setting(2, "checkpoints to keep", type=number(int, 1))

    # What a resumed run may be given anew, everything else stays as the run began; folders may have
    # moved, but what is in them must be the same (its hashes tell).
    CHANGEABLE: ClassVar[tuple[str, ...]] = (
        "teacher", "model", "data", "out", "resume", "steps", "micro_batch_tokens", "device",
        "ops", "compile",
        "eval_every", "eval_documents", "save_every", "save_minutes", "max_hours",
        "skip_nonfinite", "log_every", "keep",
    )  # fmt: skip

    def __post_init__(self):
        if isinstance(self.recipe, str):  # where Python asks, a name will do
            object.__setattr__(self, "recipe", recipe_at(self.recipe))

    @property
    def follows_teacher(self) -> bool:
        """Whether any loss compares the student with a teacher."""
        weights = (self.hidden_weight, self.attention_weight, self.output_weight)
        return self.teacher is not None and any(weights)

    @property
    def hidden_pairs(self) -> Pairs:
        """The levels that the hidden-state loss compares, as `Recipe.hidden_pairs`."""
        compared = self.follows_teacher and self.hidden_weight
        return self.recipe.hidden_pairs(self.teacher_layers) if compared else ()

    @property
    def attention_pairs(self) -> Pairs:
        """The layers whose attention maps are compared: student's, teacher's."""
        compared = self.follows_teacher and self.attention_weight
        return tuple(enumerate(self.teacher_layers)) if compared else ()

    @classmethod
    def add_flags(cls, parser: ArgumentParser) -> None:
        """One flag for each field; a flag that is not given leaves no attribute behind.

        And --print-recipe, which is no setting of a run.
        """
        for entry in dataclasses.fields(cls):
            options = dict(entry.metadata)
            if entry.default is not None and "action" not in options:
                options["help"] += f" (default: {entry.default})"
            if all(hasattr(recipe, entry.name) for recipe in RECIPES.values()):
                by_recipe = (f"{name} {getattr(r, entry.name)}" for name, r in RECIPES.items())
                options["help"] += f" (default: {', '.join(by_recipe)})"
            if "type" in options:
                options["metavar"] = METAVARS.get(options["type"], "N")
            parser.add_argument(f"--{entry.name.replace('_', '-')}", default=SUPPRESS, **options)
        parser.add_argument(
            "--print-recipe", action=PrintRecipe, choices=RECIPES, default=SUPPRESS,
            help="print a recipe as JSON, as --recipe reads it, and end",
        )  # fmt: skip

    @classmethod
    def from_flags(cls, given: dict[str, Any], restarted: bool = False) -> "RunConfig":
        """What the flags say, the rest by the recipe; with --resume what the run began with.

        restarted: by torchrun, after a rank had ended; a run that these flags began is resumed.
        """
        if restarted and not given.get("resume") and cls._began_with(given):
            given = given | {"resume": True}
        if not given.get("resume"):
            return cls(**given).resolved()
        if "out" not in given:
            raise InputError("--resume needs --out, the folder of the run to go on with")
        path = given["out"] / "config.json"
        if not path.exists():
            if "data" not in given:
                raise InputError(f"{path}: no such file, no run to go on with")
            return cls(**given).resolved()
        run, asked = cls.read(path), cls(**given)
        for name in given:
            value, began = getattr(asked, name), getattr(run, name)
            if name not in cls.CHANGEABLE and value != began:
                other = " with other settings" if str(value) == str(began) else ""
                raise InputError(
                    f"--{name.replace('_', '-')} {value}: the run began with {began}{other} "
                    f"({path}); it cannot change on --resume"
                )
        return dataclasses.replace(run, **given).resolved()

    @classmethod
    def _began_with(cls, given: dict[str, Any]) -> bool:
        """Whether the run in --out is the one that these flags began."""
        asked = cls(**given).resolved()
        if not (asked.out / "config.json").exists():
            return True
        begun = dataclasses.asdict(cls.read(asked.out / "config.json"))
        settings = dataclasses.asdict(asked) | {"resume": begun["resume"]}
        return all(value in (None, begun[name]) for name, value in settings.items())

    @classmethod
    def read(cls, path: Path) -> "RunConfig":
        """Read the settings in a run's config.json, by the same rules as flags; errors name it."""
        settings = read_json(path).get("run")
        if not isinstance(settings, dict):
            raise InputError(f"{path}: no settings of a run in it")
        values = {}
        for entry in dataclasses.fields(cls):
            value = settings.get(entry.name, entry.default)
            kind, choices = entry.metadata.get("type"), entry.metadata.get("choices")
            if value is None and entry.default is not None:
                raise InputError(f"{path}: {entry.name} is null; expected a value")
            if "action" in entry.metadata and type(value) is not bool:
                found = reprlib.repr(value)
                raise InputError(f"{path}: {entry.name} is {found}; expected true or false")
            try:
                if kind is recipe_at and isinstance(value, dict):
                    value = Recipe.from_dict(str(value.pop("name", path.name)), value)
                elif value is not None and kind is not None:
                    items = value if isinstance(value, list | tuple) else [value]
                    value = kind(",".join(map(str, items)))
            except (ArgumentTypeError, InputError) as error:
                raise InputError(f"{path}: {entry.name}: {error}") from None
            if choices is not None and value not in tuple(choices):
                raise InputError(f"{path}: {entry.name} is {value!r}; known: {', '.join(choices)}")
            values[entry.name] = value
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        values = dataclasses.asdict(self)
        return {
            key: str(value) if isinstance(value, Path) else value for key, value in values.items()
        }

    def resolved(self) -> "RunConfig":
        """With what was left open taken from the recipe, and what does not go together refused.

        A run of another length than the recipe's keeps the recipe's share of warm-up.
        """
        recipe = self.recipe
        open_fields = {
            name: value
            for name, value in dataclasses.asdict(recipe).items()
            if getattr(self, name, value) is None
        }
        if "warmup_steps" in open_fields and self.steps is not None:
            open_fields["warmup_steps"] = round(recipe.warmup_steps / recipe.steps * self.steps)
        for flag in ("data", "out"):
            if getattr(self, flag) is None:
                raise InputError(f"--{flag} is needed (without any flag the demonstration runs)")
        if recipe.needs_teacher and (self.teacher is None or self.model is not None):
            raise InputError(f"recipe {recipe} needs --teacher, and has no --model")
        if not recipe.needs_teacher and (self.model is None or self.teacher is not None):
            raise InputError(f"recipe {recipe} needs --model and has no --teacher")
        run = dataclasses.replace(self, **open_fields)
        signals = (run.hidden_weight, run.attention_weight, run.output_weight, run.teacher_layers)
        if not run.recipe.needs_teacher and any(signals):
            raise InputError(f"recipe {run.recipe} has no teacher to follow: --mlm-weight alone")
        if not (run.mlm_weight or run.hidden_weight or run.attention_weight or run.output_weight):
            raise InputError("every loss weight is 0: there is nothing to learn")
        if run.warmup_steps > run.steps:
            raise InputError(f"--warmup-steps {run.warmup_steps} of --steps {run.steps}")
        return run
