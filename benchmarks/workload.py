"""What is done in an update that is timed, and how much arithmetic it asks for.

Shapes: S sequence, H hidden, I intermediate, V vocabulary, L layers, T real tokens,
M masked positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minibert.config import BertConfig
from minibert.data.batches import Batches, GlobalBatch
from minibert.data.corpus import Corpus
from minibert.data.merge import write_corpus
from minibert.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from minibert.model import BertForMaskedLM
from minibert.recipes import RECIPES
from minibert.student import layers_to_follow, student_from_teacher


@dataclass(frozen=True)
class Work:
    """What every variant does."""

    config: BertConfig  # of the teacher; the student has every second layer
    data: Path  # a corpus folder
    batch_size: int  # sequences of an update
    max_length: int  # tokens of a sequence
    micro_batch_tokens: int  # ours; theirs is the whole batch at once
    device: torch.device
    precision: str  # of our float32 products: what set_up_device chose

    def batches(self, micro_batch_tokens: int, packed: bool = False) -> Batches:
        """The same documents and masks, however they are cut."""
        corpus = Corpus.open(self.data)
        sizes = (self.max_length, micro_batch_tokens, self.batch_size)
        return Batches(corpus, *sizes, packed=packed)


def random_models(config: BertConfig) -> tuple[BertForMaskedLM, BertForMaskedLM, tuple[int, ...]]:
    """A seeded student and teacher, and the teacher's layers that the student follows."""
    torch.manual_seed(0)
    teacher = BertForMaskedLM(config).requires_grad_(False).eval()
    layers = layers_to_follow(RECIPES["compactbiobert"], config.num_hidden_layers)
    return student_from_teacher(teacher, layers), teacher, layers


def write_random_corpus(folder: Path, vocab_size: int) -> Path:
    """A corpus of 4,096 documents of random ids; returns its folder.

    Lengths are exp(N(5.5, 0.55)) tokens, 8 at least: windows of at most 256 tokens hold 211 on
    average, and nearly half of them are full. A stand-in: real text is given with --data.
    """
    vocabulary = folder / "vocab.txt"
    special = list(SPECIAL_TOKENS.values())
    words = [f"w{number}" for number in range(vocab_size - len(special))]
    vocabulary.write_text("\n".join(special + words) + "\n")
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(5.5, 0.55, 4096)).astype(int).clip(8)
    corpus = folder / "corpus"
    documents = [
        (str(document), generator.integers(len(special), vocab_size, length).tolist())
        for document, length in enumerate(lengths)
    ]
    write_corpus(corpus, load_tokenizer(vocabulary), documents, held_out=0.0)
    return corpus


def work_of(config: BertConfig, batch: GlobalBatch) -> tuple[int, int]:
    """Real tokens and useful FLOPs of an update on a batch."""
    lengths = [
        length
        for micro_batch in batch.micro_batches
        for length in micro_batch.attention_mask.sum(1).tolist()
    ]
    L = config.num_hidden_layers // 2
    return sum(lengths), useful_flops(config, L, lengths, batch.num_masked)


def useful_flops(
    config: BertConfig, num_student_layers: int, lengths: Sequence[int], num_masked: int
) -> int:
    """Floating-point operations that an update cannot do without, an addition counted as one.

        layer  = 2 T (4 H² + 2 H I) + 4 H sum_i S_i²    weights' products; QK^T and PV
        head   = 2 M (H² + H V)                         dense and decoder, masked rows alone
        update = (L_teacher + 3 L_student) layer + (1 + 3) head

    A backward pass is two forward ones (gradients of inputs and of weights). `lengths` are the S_i
    of the sequences, without padding, T their sum, `num_masked` is M. Left out is what is no matrix
    product (softmax, GELU, LayerNorm, losses, AdamW) and what only some ways compute (logits of
    other rows, maps a second time).
    """
    H, I, V = config.hidden_size, config.intermediate_size, config.vocab_size
    T = sum(lengths)
    layer = 2 * T * (4 * H * H + 2 * H * I) + 4 * H * sum(S * S for S in lengths)
    head = 2 * num_masked * (H * H + H * V)
    return (config.num_hidden_layers + 3 * num_student_layers) * layer + (1 + 3) * head
