"""The recipes: what is learnt, from which signals, with which settings. Data only.

Published settings are those of Rohanian et al., "On the effectiveness of compact biomedical
transformers" (arXiv 2209.03182), and of the authors' scripts. A recipe of one's own is a JSON file
with the same keys (`train.py --print-recipe compactbiobert` shows one).
"""

import dataclasses
import reprlib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any

from minibert.errors import InputError

# The words for a loss, and the operation of `minibert/ops` that computes it.
HIDDEN_LOSSES = {"cosine": "hidden_state_loss", "mse": "hidden_state_mse"}
ATTENTION_LOSSES = {"kl": "attention_map_loss", "mse": "attention_map_mse"}
WORDS = {
    "start": ("teacher", "random", "model"),
    "layer_of_group": ("first", "last"),
    "hidden_loss": tuple(HIDDEN_LOSSES),
    "hidden_levels": ("each", "last", "embeddings and each"),
    "attention_loss": tuple(ATTENTION_LOSSES),
    "output_loss": ("kl", "cross_entropy"),
}
STUDENT_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
MINIMA = {"steps": 1, "batch_size": 1, "max_length": 3}  # of the other numbers 0
ABOVE_ZERO = ("temperature", "learning_rate")

Pairs = tuple[tuple[int, int], ...]  # student's, teacher's


@dataclass(frozen=True)
class Recipe:
    """How a student begins, what it is compared in, and the default settings of a run.

    A run may override any setting of the same name on its command line (`RunConfig`). Where a
    loss has weight 0, the setting that chooses its kind is ignored. Raises InputError for what
    cannot be.
    """

    name: str = field(compare=False)  # in RECIPES, or that of the file
    # "teacher": with copies of some of its layers; "random": drawn anew; "model": there is no
    # teacher, a given model learns masked-language modelling alone.
    start: str
    mlm_weight: float  # cross-entropy at masked positions
    hidden_weight: float  # `hidden_loss`, summed over the compared levels
    attention_weight: float  # `attention_loss`, summed over the student's layers
    output_weight: float  # `output_loss` at masked positions
    learning_rate: float
    weight_decay: float
    warmup_steps: int  # of `steps`; a run of another length keeps the proportion
    steps: int
    # The student's sizes, by the keys of BERT's config.json; the rest is as in the teacher, but
    # half as many layers. One that starts from the teacher's layers has its other sizes too.
    student: dict[str, int] = field(default_factory=dict)
    # A student of L_s layers makes L_s groups of its teacher's consecutive layers. Of each group
    # the first or last starts the student's layer, and supervises it.
    layer_of_group: str = "last"
    hidden_loss: str = "cosine"  # "cosine": 1 - cosine; "mse": mean squared difference
    # "each": the outputs of all student layers; "last": that of the last layer, with the teacher's
    # last; "embeddings and each": the embedding outputs too.
    hidden_levels: str = "each"
    attention_loss: str = "kl"  # "kl"; "mse": mean squared difference
    output_loss: str = "kl"  # "kl"; "cross_entropy": KL and the teacher's entropy, same gradient
    temperature: float = 1.0  # of the output distributions
    batch_size: int = 192  # sequences in one update
    max_length: int = 256  # tokens of a sequence, [CLS] and [SEP] included

    def __post_init__(self):
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name in WORDS and value not in WORDS[entry.name]:
                expected = ", ".join(map(repr, WORDS[entry.name]))
                raise InputError(f"{_found(entry.name, value)}; expected one of {expected}")
            if entry.type in (int, float):
                _check_number(entry.name, value, entry.type)
        _check_student(self.start, self.student)
        weights = (self.hidden_weight, self.attention_weight, self.output_weight)
        if not self.needs_teacher and any(weights):
            raise InputError("start is 'model', without a teacher: mlm_weight alone may be above 0")
        if not (self.mlm_weight or any(weights)):
            raise InputError("every loss weight is 0: there is nothing to learn")
        if self.warmup_steps > self.steps:
            raise InputError(f"warmup_steps is {self.warmup_steps} of {self.steps} steps")

    def __str__(self) -> str:
        return self.name

    @property
    def needs_teacher(self) -> bool:
        return self.start != "model"

    def hidden_pairs(self, teacher_layers: Sequence[int]) -> Pairs:
        """Which levels are compared: 0 the embedding output, i + 1 the output of layer i, -1 that
        of the last layer. Student layer i follows teacher layer teacher_layers[i].
        """
        each = tuple((i + 1, j + 1) for i, j in enumerate(teacher_layers))
        pairs = {"each": each, "last": ((-1, -1),), "embeddings and each": ((0, 0), *each)}
        return pairs[self.hidden_levels]

    @classmethod
    def from_dict(cls, name: str, settings: dict[str, Any]) -> "Recipe":
        """The recipe that a JSON object describes; anything wrong with it is an InputError."""
        fields = {entry.name: entry for entry in dataclasses.fields(cls) if entry.name != "name"}
        for key in settings:
            if key not in fields:
                raise InputError(f"{reprlib.repr(key)} is unknown; known: {', '.join(fields)}")
        missing = [
            key
            for key, entry in fields.items()
            if entry.default is entry.default_factory is MISSING and key not in settings
        ]
        if missing:
            raise InputError(f"{', '.join(missing)} missing")
        return cls(name=name, **settings)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads."""
        content = dataclasses.asdict(self)
        del content["name"]
        return content


def _found(name: str, value: Any) -> str:
    return f"{name} is {reprlib.repr(value)}"  # which is short, whatever it is


def _check_number(name: str, value: Any, kind: type) -> None:
    """Refuse what is not a number of the kind, in its bounds."""
    minimum, above = MINIMA.get(name, 0), name in ABOVE_ZERO
    right_type = type(value) is int or type(value) is kind
    if not right_type or not minimum <= value < 2**63 or (above and value == 0):
        wanted = "a whole number" if kind is int else "a number"
        bound = "above 0" if above else f"from {minimum} up"
        raise InputError(f"{_found(name, value)}; expected {wanted} {bound}")


def _check_student(start: str, student: Any) -> None:
    """Refuse sizes that are none, or that a student so begun does not choose."""
    if not isinstance(student, dict):
        raise InputError(f"{_found('student', student)}; expected an object with sizes")
    allowed = {"teacher": STUDENT_SIZES[:1], "random": STUDENT_SIZES, "model": ()}[start]
    for key, value in student.items():
        if key not in allowed:
            sizes = ", ".join(allowed) or "nothing"
            raise InputError(
                f"student: {reprlib.repr(key)}; where start is {start!r}, {sizes} can be said"
            )
        if type(value) is not int or value < 1:
            raise InputError(f"student: {_found(key, value)}; expected a whole number from 1 up")


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # The paper's main recipe: every other layer, all three signals.
        Recipe(
            name="compactbiobert",
            start="teacher",
            layer_of_group="last",
            mlm_weight=1.0,
            hidden_weight=3.0,
            hidden_loss="cosine",
            hidden_levels="each",
            attention_weight=3.0,
            attention_loss="kl",
            output_weight=5.0,
            output_loss="kl",
            temperature=1.0,
            learning_rate=5e-4,
            weight_decay=1e-4,
            warmup_steps=5_000,
            steps=100_000,
        ),
        # As DistilBERT was made: softer outputs, the last hidden state, no maps.
        Recipe(
            name="distilbiobert",
            start="teacher",
            layer_of_group="first",
            mlm_weight=2.0,
            hidden_weight=1.0,
            hidden_loss="cosine",
            hidden_levels="last",
            attention_weight=0.0,
            output_weight=5.0,
            output_loss="kl",
            temperature=2.0,
            learning_rate=5e-4,
            weight_decay=0.0,
            warmup_steps=5_000,
            steps=100_000,
        ),
        # As TinyBERT was made: a narrow student from nothing, which never sees the masked words
        # themselves. Its 12 heads are its teacher's, for maps are compared head by head.
        Recipe(
            name="tinybiobert",
            start="random",
            student={"num_hidden_layers": 4, "hidden_size": 312, "intermediate_size": 1200},
            layer_of_group="last",
            mlm_weight=0.0,
            hidden_weight=1.0,
            hidden_loss="mse",
            hidden_levels="embeddings and each",
            attention_weight=1.0,
            attention_loss="mse",
            output_weight=1.0,
            output_loss="cross_entropy",
            temperature=1.0,
            learning_rate=5e-4,
            weight_decay=1e-4,
            warmup_steps=10_000,
            steps=100_000,
        ),
        # Pre-training, or continuing a model on new text, as the group's BioDistilBERT was made.
        Recipe(
            name="mlm",
            start="model",
            mlm_weight=1.0,
            hidden_weight=0.0,
            attention_weight=0.0,
            output_weight=0.0,
            learning_rate=1e-4,
            weight_decay=1e-4,
            warmup_steps=10_000,
            steps=200_000,
        ),
    )
}
