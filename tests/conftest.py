"""What the tests share: where the real data lies, and a toy world at awkward sizes.

Toy sizes are pairwise different, so that a test with two axes swapped cannot pass.
"""

import dataclasses
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from minibert.config import BertConfig
from minibert.data.merge import write_corpus
from minibert.data.tokenizer import load_tokenizer
from minibert.folder import save_model
from minibert.model import BertForMaskedLM
from minibert.run_config import RunConfig

torch.set_num_threads(1)  # toy tensors: a second thread only waits
USUAL = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
for name in USUAL.keys() & {each.name for each in signal.Signals}:
    if signal.getsignal(signal.Signals[name]) is signal.SIG_IGN:  # by `nohup` or `&`
        signal.signal(signal.Signals[name], USUAL[name])  # what tests start inherits it
ROOT = Path(__file__).parent.parent
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

TOY_CONFIG = BertConfig(
    vocab_size=99,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=37,
    max_position_embeddings=29,
    initializer_range=0.2,  # so that attention is not uniform and layers differ
)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; without it the tests that ask are skipped."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not at {folder}")
    return folder


@pytest.fixture(scope="session")
def toy_world(tmp_path_factory) -> Path:
    """A folder with vocab.txt, corpus/ (43 documents of 1 to 40 words) and teacher/ (4 layers)."""
    world = tmp_path_factory.mktemp("toy")
    words = [f"w{number:02}" for number in range(TOY_CONFIG.vocab_size - len(SPECIAL_TOKENS))]
    (world / "vocab.txt").write_text("\n".join(SPECIAL_TOKENS + words) + "\n")
    generator = np.random.default_rng(0)
    documents = []
    for document in range(43):
        # Each word follows from the one before it, so that there is something to learn.
        start, stride = generator.integers(0, 94), generator.integers(1, 4)
        length = generator.integers(1, 41)
        ids = 5 + (start + stride * np.arange(length)) % 94
        documents.append((f"document {document}", ids.tolist()))
    write_corpus(world / "corpus", load_tokenizer(world / "vocab.txt"), documents, held_out=0.2)
    torch.manual_seed(0)
    save_model(world / "teacher", BertForMaskedLM(TOY_CONFIG), tokenizer_from=world)
    return world


@pytest.fixture
def toy_run(toy_world, tmp_path) -> RunConfig:
    """Settings of a run of 10 steps on the toy world."""
    return dataclasses.replace(
        RunConfig(teacher=toy_world / "teacher", data=toy_world / "corpus", out=tmp_path / "run"),
        steps=10,
        batch_size=7,
        micro_batch_tokens=60,
        max_length=19,
        learning_rate=1e-2,
        warmup_steps=2,
        log_every=1,
        device="cpu",
    ).resolved()
