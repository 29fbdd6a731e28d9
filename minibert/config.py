"""What a model is: the sizes of a BERT, the keys of its `config.json`."""

import dataclasses
import reprlib
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, ClassVar

from minibert.errors import InputError
from minibert.files import read_json

# Whatever is larger in a config.json is a slip, or meant to take all memory. The largest BERT that
# Google published has 24 layers and 340 million parameters.
LARGEST_SIZE = 10_000_000
MOST_LAYERS = 1_000
MOST_PARAMETERS = 2_000_000_000


@dataclass(frozen=True)
class BertConfig:
    """The sizes of a BERT model; field names are the keys of BERT's `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    # What other BERT variants set otherwise, and the one value that is implemented here.
    IMPLEMENTED: ClassVar[dict[str, Any]] = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "pruned_heads": {},
    }

    def __post_init__(self):
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            found = f"{entry.name} is {reprlib.repr(value)}"  # which is short, whatever it is
            if entry.type is int:
                largest = MOST_LAYERS if entry.name == "num_hidden_layers" else LARGEST_SIZE
                if type(value) is not int or not 1 <= value <= largest:
                    raise InputError(f"{found}; expected a whole number, 1 to {largest:,}")
            elif type(value) not in (int, float) or not 0 <= value < 1:
                raise InputError(f"{found}; expected a number from 0 to below 1")
        if self.hidden_size % self.num_attention_heads != 0:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if (parameters := self.num_parameters) > MOST_PARAMETERS:
            raise InputError(
                f"sizes of {parameters:,} parameters in all; expected at most {MOST_PARAMETERS:,}"
            )

    @property
    def num_parameters(self) -> int:
        """Of the model with its masked-language-modelling head."""
        V, H, I = self.vocab_size, self.hidden_size, self.intermediate_size
        norm = 2 * H
        embeddings = (V + self.max_position_embeddings + self.type_vocab_size) * H + norm
        attention = 4 * (H * H + H) + norm
        feed_forward = H * I + I + I * H + H + norm
        head = H * H + H + norm + V
        return embeddings + self.num_hidden_layers * (attention + feed_forward) + head

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "BertConfig":
        """Pick our keys out of a `config.json`; a setting that is not implemented is an InputError.

        Keys that do not touch the encoder's mathematics (`architectures`, `use_cache`) are ignored.
        """
        for key, implemented in cls.IMPLEMENTED.items():
            if settings.get(key, implemented) != implemented:
                raise InputError(
                    f"{key} is {reprlib.repr(settings[key])}; "
                    f"only {implemented!r} is implemented here"
                )
        fields = {entry.name: entry for entry in dataclasses.fields(cls)}
        missing = [
            name
            for name, entry in fields.items()
            if entry.default is MISSING and name not in settings
        ]
        if missing:
            raise InputError(f"{', '.join(missing)} missing")
        return cls(**{key: value for key, value in settings.items() if key in fields})

    @classmethod
    def read(cls, path: Path) -> "BertConfig":
        """Read a `config.json`; errors name the file."""
        settings = read_json(path)
        try:
            return cls.from_dict(settings)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`: our settings and the values of those that are fixed."""
        return self.IMPLEMENTED | dataclasses.asdict(self)


BIOBERT = BertConfig(
    vocab_size=28_996,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3_072,
)
