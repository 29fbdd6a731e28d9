"""BERT, written out: embeddings, encoder layers, masked-language-modelling head.

Shapes: B batch, S sequence, H hidden, N heads, D head size (H = N D), I intermediate,
V vocabulary, L layers, M masked positions.

Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"
(arXiv 1810.04805); the arithmetic is that of google-research/bert: LayerNorm after each residual
sum (post-norm), GELU by the error function, learnt positions.

Weights keep their own dtype; a product is of the dtype of what comes in. So a model with float32
weights computes in bfloat16 when its forward is asked to (`dtype`), and the gradient is float32.
"""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minibert.config import BertConfig
from minibert.ops import plain

NOBODY: Mapping[int, tuple[Tensor, Tensor]] = MappingProxyType({})  # of `follow`: no teacher


class EncoderOutput(NamedTuple):
    """What the layers computed."""

    word_embeddings: Tensor  # (V, H): the weight itself, for its other use (`ops.look_up`)
    embedding_output: Tensor  # (B, S, H)
    hidden_states: tuple[Tensor, ...]  # L of (B, S, H): the output of each layer
    queries: dict[int, Tensor]  # layer -> (B, N, S, D), for the layers named in `keep`
    keys: dict[int, Tensor]  # layer -> (B, N, S, D), for the same layers
    map_losses: dict[int, Tensor]  # layer -> (), for the layers that `follow` a teacher's


class MaskedLMOutput(NamedTuple):
    """`EncoderOutput` and what the head made of it."""

    word_embeddings: Tensor  # (V, H): also the decoder, from head_output to the vocabulary
    embedding_output: Tensor  # (B, S, H)
    hidden_states: tuple[Tensor, ...]  # L of (B, S, H)
    queries: dict[int, Tensor]  # layer -> (B, N, S, D)
    keys: dict[int, Tensor]  # layer -> (B, N, S, D)
    map_losses: dict[int, Tensor]  # layer -> ()
    head_output: Tensor  # (M, H): the head's transform at the masked positions


class Linear(nn.Linear):
    """x W^T + b, with weight and bias rounded to the dtype of x."""

    def forward(self, values: Tensor, ops: ModuleType = plain) -> Tensor:
        """values (..., in); returns (..., out)."""
        return ops.linear(values, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Each row to mean 0 and variance 1, times weight, plus bias, rounded to the rows' dtype."""

    def forward(self, rows: Tensor) -> Tensor:
        """rows (..., H); returns the same shape."""
        weight, bias = self.weight.to(rows.dtype), self.bias.to(rows.dtype)  # (H,)
        return F.layer_norm(rows, self.normalized_shape, weight, bias, self.eps)


class AddAndNorm(nn.LayerNorm):
    """LayerNorm of a sum: of what came in and what a half of a layer has made of it."""

    def forward(
        self, residual: Tensor, values: Tensor, dropout: float, ops: ModuleType = plain
    ) -> Tensor:
        """residual, values (B, S, H), dropout: of the values; returns (B, S, H)."""
        return ops.add_and_norm(residual, values, dropout, self.weight, self.bias, self.eps)


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
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        ops: ModuleType = plain,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """input_ids (B, S), token_type_ids (B, S) or None for all 0, position_ids (B, S) or None
        for 0 to S - 1; returns the embeddings (B, S, H), and those of all words (V, H).
        """
        S = input_ids.shape[1]
        token_types = self.token_type_embeddings.weight[0]  # (H,)
        if token_type_ids is not None:
            token_types = self.token_type_embeddings(token_type_ids)  # (B, S, H)
        if position_ids is None:
            positions = self.position_embeddings.weight[:S]  # (S, H)
        else:
            positions = self.position_embeddings(position_ids)  # (B, S, H)
        words, all_words = ops.look_up(self.word_embeddings.weight, input_ids)  # (B, S, H), (V, H)
        embeddings = self.layer_norm(words + (positions + token_types))  # (B, S, H)
        dropout = self.hidden_dropout if self.training else 0.0
        return ops.dropout(embeddings, dropout), all_words  # (B, S, H), (V, H)


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
        self.attention_layer_norm = AddAndNorm(H, eps=config.layer_norm_eps)
        self.intermediate = Linear(H, I)
        self.output = Linear(I, H)
        self.output_layer_norm = AddAndNorm(H, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_state: Tensor,
        attention_mask: Tensor,
        ops: ModuleType = plain,
        followed: tuple[Tensor, Tensor] | None = None,
        map_loss: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """hidden_state (B, S, H), attention_mask (B, S) as in `BertModel.encode`.

        followed: a teacher's query and key (B, N, S, its D), with which `map_loss` (None:
        `ops.attention_map_loss`) compares. Returns the layer's output (B, S, H), its query and key
        (B, N, S, D), and that loss.
        """
        B, S, H = hidden_state.shape
        N, D = self.num_attention_heads, H // self.num_attention_heads
        attention_dropout = self.attention_dropout if self.training else 0.0
        hidden_dropout = self.hidden_dropout if self.training else 0.0

        linears = ((each.weight, each.bias) for each in (self.query, self.key, self.value))
        query, key, value = (
            projection.view(B, S, N, D).transpose(1, 2)  # (B, N, S, D)
            for projection in ops.projections(hidden_state, *linears)  # (B, S, H)
        )
        given = (query, key, value, attention_mask, attention_dropout)
        if followed is None:
            context, loss = ops.attention(*given), None  # (B, N, S, D)
        else:  # the loss of the maps needs the scores that attention makes
            map_loss = map_loss or ops.attention_map_loss
            context, loss = ops.attention_and_map_loss(*given, *followed, map_loss)
        context = context.transpose(1, 2).reshape(B, S, H)  # (B, S, H)
        context = self.attention_output(context, ops)  # (B, S, H)
        hidden_state = self.attention_layer_norm(hidden_state, context, hidden_dropout, ops)

        inner, outer = ((each.weight, each.bias) for each in (self.intermediate, self.output))
        output = ops.feed_forward(hidden_state, inner, outer)  # (B, S, H)
        hidden_state = self.output_layer_norm(hidden_state, output, hidden_dropout, ops)
        return hidden_state, query, key, loss  # (B, S, H), (B, N, S, D) twice, ()


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
        follow: Mapping[int, tuple[Tensor, Tensor]] = NOBODY,
        map_loss: Callable[..., Tensor] | None = None,
        position_ids: Tensor | None = None,
    ) -> EncoderOutput:
        """Run embeddings and layers; `keep` names the layers whose queries and keys are returned.

        input_ids, attention_mask (1 = real), token_type_ids (B, S); dtype: of all that follows the
        embeddings, None for that of the weights; ops: whose operations, `ops.plain` or `ops.fused`;
        follow: for some layers the query and key of the teacher's that they are compared with, by
        `map_loss` (None: `ops.attention_map_loss`). Where a row holds several sequences, the mask
        has their numbers (`plain.same_sequence`; not on a GPU with `ops.fused`), and position_ids
        (B, S) is each token's place in its own. Raises ValueError where the sequence is longer than
        the model has positions, and no position_ids are given.
        """
        S, longest = input_ids.shape[1], self.config.max_position_embeddings
        if position_ids is None and longest < S:
            raise ValueError(f"a sequence of {S} tokens; the model has {longest} positions")
        given = (input_ids, token_type_ids, ops, position_ids)
        embedding_output, word_embeddings = self.embeddings(*given)  # (B, S, H), (V, H)
        if dtype is not None:
            embedding_output = embedding_output.to(dtype)
        hidden_state = embedding_output
        hidden_states, queries, keys, map_losses = [], {}, {}, {}
        for number, layer in enumerate(self.layers):
            followed = follow.get(number)
            hidden_state, query, key, loss = layer(
                hidden_state, attention_mask, ops, followed, map_loss
            )  # (B, S, H), (B, N, S, D) twice, ()
            hidden_states.append(hidden_state)
            if followed is not None:
                map_losses[number] = loss
            if number in keep:
                queries[number], keys[number] = query, key  # (B, N, S, D)
        states = (embedding_output, tuple(hidden_states))
        return EncoderOutput(word_embeddings, *states, queries, keys, map_losses)

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

    def forward(self, hidden_rows: Tensor, ops: ModuleType = plain) -> Tensor:
        """hidden_rows (M, H); returns (M, H)."""
        return self.layer_norm(F.gelu(self.dense(hidden_rows, ops)))


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
        follow: Mapping[int, tuple[Tensor, Tensor]] = NOBODY,
        map_loss: Callable[..., Tensor] | None = None,
        position_ids: Tensor | None = None,
    ) -> MaskedLMOutput:
        """input_ids, attention_mask, token_type_ids (B, S) and the others as in `encode`.

        masked_positions (M,) are indices into the B * S positions, row after row; None is all of
        them. Only there does the head run: 15 % of the positions are 15 % of the work.
        """
        settings = (keep, dtype, ops, follow, map_loss, position_ids)
        encoded = self.encode(input_ids, attention_mask, token_type_ids, *settings)
        hidden_rows = encoded.hidden_states[-1].flatten(0, 1)  # (B * S, H)
        if masked_positions is not None:
            hidden_rows = hidden_rows.index_select(0, masked_positions)  # (M, H)
        return MaskedLMOutput(*encoded, head_output=self.head(hidden_rows, ops))

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
