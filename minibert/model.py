"""BERT, written out: embeddings, encoder layers, masked-language-modelling head.

Shapes: B batch, S sequence, H hidden, N heads, D head size (H = N D), I intermediate,
V vocabulary, L layers, M masked positions.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"
(arXiv 1810.04805); the arithmetic is that of google-research/bert: LayerNorm after each residual
sum (post-norm), GELU by the error function, learnt positions.

Weights keep their own dtype; a product is of the dtype of what comes in. So a model with float32
weights computes in bfloat16 when its forward is asked to (`dtype`), and the gradient is float32.
"""

from collections.abc import Collection
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.config import BertConfig
from minibert.ops import plain


class EncoderOutput(NamedTuple):
    """What the layers computed."""

    embedding_output: Tensor  # (B, S, H)
    hidden_states: tuple[Tensor, ...]  # L of (B, S, H): the output of each layer
    queries: dict[int, Tensor]  # layer -> (B, N, S, D), for the layers named in `keep`
    keys: dict[int, Tensor]  # layer -> (B, N, S, D), for the same layers


class MaskedLMOutput(NamedTuple):
    """`EncoderOutput` and what the head made of it."""

    embedding_output: Tensor  # (B, S, H)
    hidden_states: tuple[Tensor, ...]  # L of (B, S, H)
    queries: dict[int, Tensor]  # layer -> (B, N, S, D)
    keys: dict[int, Tensor]  # layer -> (B, N, S, D)
    head_output: Tensor  # (M, H): the head's transform at the masked positions


class Linear(nn.Linear):
    """x W^T + b, with weight and bias rounded to the dtype of x."""

    def forward(self, values: Tensor) -> Tensor:
        """values (..., in); returns (..., out)."""
        return F.linear(values, self.weight.to(values.dtype), self.bias.to(values.dtype))


class LayerNorm(nn.LayerNorm):
    """Each row to mean 0 and variance 1, times weight, plus bias, rounded to the rows' dtype."""

    def forward(self, rows: Tensor) -> Tensor:
        """rows (..., H); returns the same shape."""
        weight, bias = self.weight.to(rows.dtype), self.bias.to(rows.dtype)  # (H,)
        return F.layer_norm(rows, self.normalized_shape, weight, bias, self.eps)


class Embeddings(nn.Module):
    """The sum of what a token is, where it stands and which segment it is in, normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        H = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, H)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, H)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, H)
        self.layer_norm = LayerNorm(H, eps=config.layer_norm_eps)
        self.hidden_dropout = config.hidden_dropout_prob

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, ops: ModuleType = plain
    ) -> Tensor:
        """input_ids (B, S), token_type_ids (B, S) or None for all 0; returns (B, S, H)."""
        S = input_ids.shape[1]
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)  # (B, S)
        embeddings = self.word_embeddings(input_ids)  # (B, S, H)
        embeddings = embeddings + self.position_embeddings.weight[:S]  # (B, S, H) + (S, H)
        embeddings = embeddings + self.token_type_embeddings(token_type_ids)  # (B, S, H)
        dropout = self.hidden_dropout if self.training else 0.0
        return ops.dropout(self.layer_norm(embeddings), dropout)  # (B, S, H)


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each added to its input and normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        H, I = config.hidden_size, config.intermediate_size
        self.num_attention_heads = config.num_attention_heads
        self.attention_dropout = config.attention_probs_dropout_prob
        self.hidden_dropout = config.hidden_dropout_prob
        self.query = Linear(H, H)
        self.key = Linear(H, H)
        self.value = Linear(H, H)
        self.attention_output = Linear(H, H)
        self.attention_layer_norm = LayerNorm(H, eps=config.layer_norm_eps)
        self.intermediate = Linear(H, I)
        self.output = Linear(I, H)
        self.output_layer_norm = LayerNorm(H, eps=config.layer_norm_eps)

    def forward(
        self, hidden_state: Tensor, attention_mask: Tensor, ops: ModuleType = plain
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_state (B, S, H), attention_mask (B, S), 1 = real.

        Returns the layer's output (B, S, H), and its query and key (B, N, S, D).
        """
        B, S, H = hidden_state.shape
        N, D = self.num_attention_heads, H // self.num_attention_heads
        attention_dropout = self.attention_dropout if self.training else 0.0
        hidden_dropout = self.hidden_dropout if self.training else 0.0

        query = self.query(hidden_state).view(B, S, N, D).transpose(1, 2)  # (B, N, S, D)
        key = self.key(hidden_state).view(B, S, N, D).transpose(1, 2)  # (B, N, S, D)
        value = self.value(hidden_state).view(B, S, N, D).transpose(1, 2)  # (B, N, S, D)
        context = ops.attention(query, key, value, attention_mask, attention_dropout)
        context = context.transpose(1, 2).reshape(B, S, H)  # (B, S, H)
        attended = ops.dropout(self.attention_output(context), hidden_dropout)  # (B, S, H)
        hidden_state = self.attention_layer_norm(hidden_state + attended)  # (B, S, H)

        intermediate = F.gelu(self.intermediate(hidden_state))  # (B, S, I)
        output = ops.dropout(self.output(intermediate), hidden_dropout)  # (B, S, H)
        return self.output_layer_norm(hidden_state + output), query, key


class BertModel(nn.Module):
    """The encoder without a head."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        """Weights from N(0, initializer_range), biases 0 (google-research/bert, `modeling.py`).

        LayerNorm keeps its own start: weight 1, bias 0.
        """
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        keep: Collection[int] = (),
        dtype: torch.dtype | None = None,
        ops: ModuleType = plain,
    ) -> EncoderOutput:
        """Run embeddings and layers; `keep` names the layers whose queries and keys are returned.

        input_ids, attention_mask (1 = real), token_type_ids (B, S); dtype: of all that follows the
        embeddings, None for that of the weights; ops: whose attention and dropout, `ops.plain` or
        `ops.fused`. Raises ValueError where the sequence is longer than the model has positions.
        """
        S, longest = input_ids.shape[1], self.config.max_position_embeddings
        if longest < S:
            raise ValueError(f"a sequence of {S} tokens; the model has {longest} positions")
        embedding_output = self.embeddings(input_ids, token_type_ids, ops)  # (B, S, H)
        if dtype is not None:
            embedding_output = embedding_output.to(dtype)
        hidden_state = embedding_output
        hidden_states, queries, keys = [], {}, {}
        for number, layer in enumerate(self.layers):
            hidden_state, query, key = layer(hidden_state, attention_mask, ops)  # (B, S, H)
            hidden_states.append(hidden_state)
            if number in keep:
                queries[number], keys[number] = query, key  # (B, N, S, D)
        return EncoderOutput(embedding_output, tuple(hidden_states), queries, keys)

    forward = encode


class MaskedLMHead(nn.Module):
    """What stands between the last hidden state and the vocabulary.

    The decoder itself is the word-embedding matrix (tied); only its bias lives here.
    """

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_rows: Tensor) -> Tensor:
        """hidden_rows (M, H); returns (M, H)."""
        return self.layer_norm(F.gelu(self.dense(hidden_rows)))


class BertForMaskedLM(BertModel):
    """The encoder with its masked-language-modelling head."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.head = MaskedLMHead(config)
        self.head.apply(self._initialise)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        masked_positions: Tensor | None = None,
        keep: Collection[int] = (),
        dtype: torch.dtype | None = None,
        ops: ModuleType = plain,
    ) -> MaskedLMOutput:
        """input_ids, attention_mask (1 = real), token_type_ids (B, S); keep, dtype, ops: `encode`.

        masked_positions (M,) are indices into the B * S positions, row after row; None is all of
        them. Only there does the head run: 15 % of the positions are 15 % of the work.
        """
        encoded = self.encode(input_ids, attention_mask, token_type_ids, keep, dtype, ops)
        hidden_rows = encoded.hidden_states[-1].flatten(0, 1)  # (B * S, H)
        if masked_positions is not None:
            hidden_rows = hidden_rows[masked_positions]  # (M, H)
        return MaskedLMOutput(*encoded, head_output=self.head(hidden_rows))

    @property
    def decoder(self) -> Tensor:
        """The matrix from the head's output to the vocabulary, (V, H): the word embeddings."""
        return self.embeddings.word_embeddings.weight

    @property
    def decoder_bias(self) -> Tensor:
        """The vocabulary's bias (V,)."""
        return self.head.decoder_bias

    def logits(self, head_output: Tensor) -> Tensor:
        """head_output (M, H) of any dtype; returns (M, V) in that of the weights."""
        return F.linear(head_output.to(self.decoder.dtype), self.decoder, self.decoder_bias)
