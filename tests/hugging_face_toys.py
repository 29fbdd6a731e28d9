"""Toy checkpoints as Hugging Face writes them, for the tests of convert_weights.py."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import SPECIAL_TOKENS, TOY_CONFIG
from torch import Tensor

from minibert.model import BertForMaskedLM

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()

WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
BIAS, DECODER_BIAS = "cls.predictions.bias", "cls.predictions.decoder.bias"
DECODER_WEIGHT = "cls.predictions.decoder.weight"


def toy_model(architecture: str = "BertForMaskedLM", dtype: torch.dtype = torch.float32):
    """A seeded transformers model of TOY_CONFIG's sizes, no tensor of it constant."""
    config = transformers.BertConfig(**dataclasses.asdict(TOY_CONFIG))
    config._attn_implementation = "eager"
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = getattr(transformers, architecture)(config).eval()
        for parameter in model.parameters():  # biases and LayerNorm begin as constants
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.to(dtype)


def toy_batch() -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask and token_type_ids, (5, 13); the last two sequences are padded."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, TOY_CONFIG.vocab_size, (5, 13), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[3:, 7:] = 0
    return input_ids, attention_mask, (torch.arange(13) > 6).long().expand(5, 13)


def assert_same_logits(ours: BertForMaskedLM, theirs, batch=None) -> None:
    """Our model and a transformers model agree on a batch (`toy_batch()`), at its real positions.

    In float64, where rounding hides nothing; both models are left in that dtype.
    """
    input_ids, attention_mask, token_type_ids = batch or toy_batch()
    ours, theirs = ours.double(), theirs.double()
    with torch.no_grad():
        output = ours(input_ids, attention_mask, token_type_ids)
        found = ours.logits(output.head_output)  # (B * S, V)
        expected = theirs(input_ids, attention_mask, token_type_ids)[0].flatten(0, 1)  # (B * S, V)
    real = attention_mask.flatten().bool()  # (B * S,)
    torch.testing.assert_close(found[real], expected[real], rtol=0, atol=1e-10)


def save_toy(folder: Path, model, **options) -> Path:
    """Write a model as transformers does, and a vocab.txt beside it; returns the folder."""
    model.save_pretrained(folder, **options)
    words = [f"w{number:02}" for number in range(TOY_CONFIG.vocab_size - len(SPECIAL_TOKENS))]
    (folder / "vocab.txt").write_text("\n".join(SPECIAL_TOKENS + words) + "\n")
    return folder


def save_state(folder: Path, tensors: dict[str, Tensor], **options) -> Path:
    """Write any tensors as `pytorch_model.bin`, with the toy's config.json and vocab.txt."""
    save_toy(folder, toy_model())
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", **options)
    return folder


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes."""
    described = [(tensor.shape, tensor.dtype) for tensor in (left, right)]
    bytes_of = [tensor.contiguous().view(torch.uint8) for tensor in (left, right)]
    return described[0] == described[1] and torch.equal(*bytes_of)
