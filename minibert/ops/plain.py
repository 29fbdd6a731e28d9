"""Attention and the loss terms as plain formulas: the truth that faster versions are held to.

Shapes: B batch, S sequence, N heads, D head size, H hidden, I intermediate, V vocabulary, M masked
positions.
Each loss is a *sum* over what it counts; the loop divides by the counts of the whole global batch
(of `vocabulary_loss` the weights), so that the result does not depend on how the batch was cut.
Sums are float32 (float64 for float64 inputs). Which losses, and why: Rohanian et al., arXiv
2209.03182, and the authors' scripts.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100  # a row of labels that no vocabulary loss counts, as in torch's cross_entropy

SHORTEST = 1e-8  # the least norm that a vector is divided by: eps of torch's cosine_similarity


def attention_scores(query: Tensor, key: Tensor, attention_mask: Tensor) -> Tensor:
    """Scaled dot products, before the softmax (Vaswani et al. 2017, section 3.2.1).

    query, key (B, N, S, D); attention_mask (B, S) as in `same_sequence`. Returns (B, N, S, S) in
    float32 or better; a key that is not of the query's sequence has the lowest finite number: after
    softmax, exactly 0.
    """
    query, key = _at_least_float32(query), _at_least_float32(key)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # (B, N, S, S)
    return scores.masked_fill(~same_sequence(attention_mask), torch.finfo(scores.dtype).min)


def same_sequence(attention_mask: Tensor) -> Tensor:
    """Which keys a query sees, (B, 1, S, S): those of its own sequence; padding sees padding.

    attention_mask (B, S): 0 = padding, 1 = real; of packed rows, the number of each token's
    sequence, counted from 1.
    """
    return attention_mask[:, None, :, None] == attention_mask[:, None, None, :]


def attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, dropout: float
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V, with dropout on the attention probabilities.

    query, key, value (B, N, S, D); attention_mask (B, S) as in `same_sequence`; dropout: the
    probability, 0 at evaluation. Returns the context (B, N, S, D).
    """
    attention_probs = attention_scores(query, key, attention_mask).softmax(dim=-1)  # (B, N, S, S)
    attention_probs = F.dropout(attention_probs, dropout).to(value.dtype)
    return attention_probs @ value  # (B, N, S, D)


def look_up(table: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `table` (V, H) that `ids` (B, S) name, (B, S, H); and the table, as it is.

    The second is for another use of the same table: BERT's decoder is its word embeddings, and
    whoever sees both uses together can form the one gradient of both (`fused.py`).
    """
    return F.embedding(ids, table), table


def dropout(values: Tensor, probability: float) -> Tensor:
    """Zero each value with `probability`, scale the rest up so that the expectation stays."""
    return F.dropout(values, probability)


def linear(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b: values (..., in), weight (out, in), bias (out,); returns (..., out).

    Weight and bias are rounded to the dtype of the values.
    """
    return F.linear(values, weight.to(values.dtype), bias.to(values.dtype))


def feed_forward(
    values: Tensor, inner: tuple[Tensor, Tensor], outer: tuple[Tensor, Tensor]
) -> Tensor:
    """GELU(x W_1^T + b_1) W_2^T + b_2: the second half of a layer (Vaswani et al. 2017, 3.3).

    values (..., H); inner: W_1 (I, H), b_1 (I,); outer: W_2 (H, I), b_2 (H,), rounded as in
    `linear`. Returns (..., H). GELU by the error function (Hendrycks and Gimpel, arXiv 1606.08415):
    x times the probability that a standard normal number is below x.
    """
    intermediate = F.gelu(linear(values, *inner))  # (..., I)
    return linear(intermediate, *outer)  # (..., H)


def projections(values: Tensor, *linears: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Several linear maps of the same values: weight and bias of each, as in `linear`."""
    return tuple(linear(values, weight, bias) for weight, bias in linears)


def add_and_norm(
    residual: Tensor, values: Tensor, probability: float, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """LayerNorm(residual + dropout(values)), what follows each half of an encoder layer.

    residual, values (..., H); probability: of dropout, 0 at evaluation; weight, bias (H,), rounded
    to the rows' dtype. Returns (..., H): each row of the sum brought to mean 0 and variance 1,
    times weight, plus bias (Vaswani et al. 2017, section 5.4; Ba et al., arXiv 1607.06450).
    """
    total = residual + dropout(values, probability)  # (..., H)
    weight, bias = weight.to(total.dtype), bias.to(total.dtype)  # (H,)
    return F.layer_norm(total, weight.shape, weight, bias, eps)


def vocabulary_loss(
    student_head: Tensor,
    student_decoder: Tensor,
    student_bias: Tensor,
    teacher_head: Tensor | None,
    teacher_decoder: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    temperature: float = 1.0,
    mlm_weight: float = 1.0,
    output_weight: float = 1.0,
    teacher_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both losses over the vocabulary: cross-entropy with the labels, KL from the teacher.

        loss       = mlm_weight mlm_sum + output_weight output_sum
        mlm_sum    = sum_m -log p_s(label_m)
        output_sum = T^2 sum_m sum_v p_t(v) (log p_t(v) - log p_s(v)),   p = softmax(logits / T)

    With `teacher_entropy` output_sum is the soft cross-entropy, T^2 sum_m sum_v -p_t(v) log p_s(v):
    the KL and the teacher's entropy, which adds to the value and nothing to the gradient.

    heads (M, H) are the MLM heads' outputs at the masked positions, decoders (V, H), biases (V,),
    labels (M,) the original ids or -100 for a row that does not count. Without a teacher (None)
    output_sum is 0. T^2 keeps the size of the gradient (Hinton et al. 2015, section 2).

    Returns three scalars: the loss, and the two sums for the log, without gradient. Who knows the
    weights beforehand can form the one gradient of both together with the value (`fused.py`).
    """
    student_logits = _logits(student_head, student_decoder, student_bias)  # (M, V)
    mlm_sum = F.cross_entropy(student_logits, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    if teacher_head is None:
        return mlm_weight * mlm_sum, mlm_sum.detach(), torch.zeros_like(mlm_sum)
    teacher_logits = _logits(teacher_head, teacher_decoder, teacher_bias)  # (M, V)
    student_log_probs = (student_logits / temperature).log_softmax(dim=-1)  # (M, V)
    teacher_log_probs = (teacher_logits / temperature).log_softmax(dim=-1)  # (M, V)
    teacher_probs = teacher_log_probs.exp()  # (M, V)
    if teacher_entropy:
        distances = -(teacher_probs * student_log_probs).sum(dim=-1)  # (M,): cross-entropy
    else:
        distances = (teacher_probs * (teacher_log_probs - student_log_probs)).sum(dim=-1)  # KL
    output_sum = distances[labels != IGNORED_LABEL].sum() * temperature**2
    loss = mlm_weight * mlm_sum + output_weight * output_sum
    return loss, mlm_sum.detach(), output_sum.detach()


def _logits(head: Tensor, decoder: Tensor, bias: Tensor) -> Tensor:
    """head (M, H), decoder (V, H), bias (V,); returns (M, V)."""
    return F.linear(*map(_at_least_float32, (head, decoder, bias)))


def attention_map_loss(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    attention_mask: Tensor,
) -> Tensor:
    """KL of the attention maps of one layer, from the queries and keys of both models.

        kl_sum = sum over heads and real rows i of sum_j P_t[i, j] (log P_t[i, j] - log P_s[i, j])

    queries and keys (B, N, S, D), D may differ between the models; attention_mask (B, S) as in
    `same_sequence`. The maps are those before dropout, through log-softmax: no epsilon. Returns a
    scalar.
    """
    student_log_probs = attention_scores(student_query, student_key, attention_mask).log_softmax(-1)
    teacher_log_probs = attention_scores(teacher_query, teacher_key, attention_mask).log_softmax(-1)
    kl = teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)  # (B, N, S, S)
    real = attention_mask.bool()[:, None, :, None]  # (B, 1, S, 1)
    return kl.masked_fill(~(real & same_sequence(attention_mask)), 0).sum()


def attention_map_mse(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    attention_mask: Tensor,
) -> Tensor:
    """Squared differences of the attention maps of one layer, from queries and keys of both models.

        square_sum = sum over heads and real rows i of sum_j (P_s[i, j] - P_t[i, j])^2

    Arguments as in `attention_map_loss`; the maps are those after softmax, before dropout. Keys
    that a real token does not see are 0 in both. A mean over all elements of the padded maps, as in
    TinyBERT (Jiao et al., arXiv 1909.10351) and in the authors' script, counts the rows of padding
    too, which hold whatever padding looks at; here they do not count. Returns a scalar.
    """
    student_probs = attention_scores(student_query, student_key, attention_mask).softmax(-1)
    teacher_probs = attention_scores(teacher_query, teacher_key, attention_mask).softmax(-1)
    padding_rows = attention_mask[:, None, :, None] == 0  # (B, 1, S, 1)
    return (student_probs - teacher_probs).square().masked_fill(padding_rows, 0).sum()


def attention_and_map_loss(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float,
    teacher_query: Tensor,
    teacher_key: Tensor,
    map_loss: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """`attention`, and a loss of its maps beside a teacher's: two results of the same scores.

    Arguments as in those two; map_loss is `attention_map_loss` or `attention_map_mse`. Returns the
    context (B, N, S, D) and the loss, a scalar.
    """
    context = attention(query, key, value, attention_mask, dropout)
    return context, map_loss(query, key, teacher_query, teacher_key, attention_mask)


def hidden_state_loss(
    student_hidden: Tensor, teacher_hidden: Tensor, attention_mask: Tensor
) -> Tensor:
    """sum over real tokens of 1 - cos(student, teacher), for the hidden states of one layer.

    hidden states (B, S, H), attention_mask (B, S), 1 = real. Returns a scalar.
    """
    real = attention_mask.bool()  # (B, S)
    student_rows = _at_least_float32(student_hidden[real])  # (real tokens, H)
    teacher_rows = _at_least_float32(teacher_hidden[real])  # (real tokens, H)
    return (1 - F.cosine_similarity(student_rows, teacher_rows, dim=-1, eps=SHORTEST)).sum()


def hidden_state_mse(
    student_hidden: Tensor, teacher_hidden: Tensor, attention_mask: Tensor
) -> Tensor:
    """sum over real tokens of the mean over H of (student - teacher)^2, at one level.

    hidden states (B, S, H), attention_mask (B, S), 1 = real. A mean over all elements, as in the
    authors' script, counts padding too; here only real tokens count. Returns a scalar.
    """
    real = attention_mask.bool()  # (B, S)
    student_rows = _at_least_float32(student_hidden[real])  # (real tokens, H)
    teacher_rows = _at_least_float32(teacher_hidden[real])  # (real tokens, H)
    return (student_rows - teacher_rows).square().mean(dim=-1).sum()


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Half precisions to float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
