"""The recipes: what is learnt, from which signals, with which settings. Data only.

Published settings are those of Rohanian et al., "On the effectiveness of compact biomedical
transformers" (arXiv 2209.03182), and of the authors' scripts.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The weights of the loss terms and the default settings of a run.

    A run may override any setting of the same name on its command line (`RunConfig`).
    """

    needs_teacher: bool  # False: masked-language modelling alone
    mlm_weight: float  # cross-entropy at masked positions
    hidden_weight: float  # 1 - cosine of hidden states, summed over the supervised layers
    attention_weight: float  # KL of attention maps, summed over the supervised layers
    output_weight: float  # KL of the output distributions at masked positions
    temperature: float  # of the output distributions
    learning_rate: float
    weight_decay: float
    warmup_steps: int  # of `steps`; a run of another length keeps the proportion
    steps: int
    batch_size: int = 192  # sequences in one update
    max_length: int = 256  # tokens of a sequence, [CLS] and [SEP] included


RECIPES = {
    # The paper's main recipe: every other layer, all three signals.
    "compactbiobert": Recipe(
        needs_teacher=True,
        mlm_weight=1.0,
        hidden_weight=3.0,
        attention_weight=3.0,
        output_weight=5.0,
        temperature=1.0,
        learning_rate=5e-4,
        weight_decay=1e-4,
        warmup_steps=5_000,
        steps=100_000,
    ),
    # Pre-training, or continuing a model on new text, as the group's BioDistilBERT was made.
    "mlm": Recipe(
        needs_teacher=False,
        mlm_weight=1.0,
        hidden_weight=0.0,
        attention_weight=0.0,
        output_weight=0.0,
        temperature=1.0,
        learning_rate=1e-4,
        weight_decay=1e-4,
        warmup_steps=10_000,
        steps=200_000,
    ),
}
