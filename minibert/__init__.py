"""minibert: BioBERT distilled into CompactBioBERT, written out in plain PyTorch.

The reading order is in README.md; it begins with `minibert/model.py`.
"""

from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from minibert.data.tokenizer import Tokenizer
    from minibert.model import BertModel


class Pretrained(NamedTuple):
    """A model and the tokenizer that it reads through."""

    model: "BertModel"
    tokenizer: "Tokenizer"


def load(folder: str | PathLike[str]) -> Pretrained:
    """Model and tokenizer of a folder: a model folder of ours, or one of Hugging Face's.

    The model is a `BertForMaskedLM`, or a `BertModel` where the folder holds no such head; on the
    CPU, in float32, in eval mode, without gradients (`model.requires_grad_()` brings them back).
    Raises InputError for a folder that is neither, or whose files do not fit each other.

    >>> import minibert, torch
    >>> model, tokenizer = minibert.load("models/biobert")
    >>> (ids,) = tokenizer.encode_batch(["a gene of the cell"])
    >>> input_ids = torch.tensor([[tokenizer.cls_id, *ids, tokenizer.sep_id]])  # (B, S)
    >>> output = model(input_ids, attention_mask=torch.ones_like(input_ids))
    >>> output.hidden_states[-1].shape  # (B, S, H)
    torch.Size([1, 7, 768])
    """
    from minibert.hugging_face import load_either  # here, for it imports torch: seconds

    return Pretrained(*load_either(folder))
