"""Seeds: every random draw is a function of numbers that say which draw it is."""

import numpy as np


def dropout_seed(*numbers: int) -> int:
    """The seed of dropout: (seed, step, rank) of an update, or (seed, epoch) in fine-tuning."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
