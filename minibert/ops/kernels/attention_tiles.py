"""What the kernels of attention share: rows of heads, tiles of scores, a softmax over tiles.

Shapes: S sequence, D head size. A GPU exponentiates to base 2: so scores are divided by ln 2, which
makes exp(S) = 2^score; a log-sum-exp is log2 sum_j 2^score, and the KL is multiplied by ln 2 again.
"""

import math

import triton
import triton.language as tl

LOG_2 = tl.constexpr(math.log(2))
# Below every score, yet finite: the difference of two is 0, not NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def place_of_program(S, row_stride, teacher_row_stride, D: tl.constexpr, TEACHER_D: tl.constexpr):
    """What a program of a grid (tiles, N, B) works on: b, the sequence; the number of its head
    among all B N; and where that head's rows begin in the student's tensors, in the teacher's, and
    in those that attention makes, (B, S, N, D).
    """
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)  # B S N D may pass 2^31
    N = tl.num_programs(1)
    student_place = b * S * row_stride + n * D
    teacher_place = b * S * teacher_row_stride + n * TEACHER_D
    return b, b * N + n, student_place, teacher_place, (b * S * N + n) * D


@triton.jit
def load_rows(matrix, rows, row_stride, inside, D: tl.constexpr, D_TILE: tl.constexpr):
    """Rows of a matrix (S, D) as (rows, D_TILE): 0 from column D on, and in rows not `inside`."""
    columns = tl.arange(0, D_TILE)
    places = matrix + rows[:, None] * row_stride + columns[None, :]
    there = inside[:, None]
    if D < D_TILE:
        there = there & (columns < D)[None, :]
    return tl.load(places, mask=there, other=0.0)


@triton.jit
def store_rows(matrix, values, rows, row_stride, inside, D: tl.constexpr, D_TILE: tl.constexpr):
    """The inverse of `load_rows`."""
    columns = tl.arange(0, D_TILE)
    places = matrix + rows[:, None] * row_stride + columns[None, :]
    there = inside[:, None]
    if D < D_TILE:
        there = there & (columns < D)[None, :]
    tl.store(places, values.to(matrix.dtype.element_ty), mask=there)


@triton.jit
def product(left, right):
    """left right^T with float32 sums; float32 is multiplied as such, never as TF32."""
    return tl.dot(left, tl.trans(right), input_precision="ieee")


@triton.jit
def scores(left, right, D: tl.constexpr):
    """left right^T / (sqrt(D) ln 2)."""
    return product(left, right) * (D**-0.5 / LOG_2)


@triton.jit
def softmax_of_nothing(ROWS: tl.constexpr):
    """The largest score of each row, and the sum, before the first tile."""
    return tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def softmax_so_far(tile, largest, total):
    """One more tile of scores of a softmax: exponentials relative to the largest score so far, what
    earlier ones are rescaled by, the largest score and the sum with this tile.

    (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., 2205.14135.) Tiles of padding before the
    first real key add exp(LOWEST - LOWEST) = 1 a key to the sum; the first real key rescales that
    by exp(LOWEST - largest) = 0.
    """
    new_largest = tl.maximum(largest, tl.max(tile, axis=1))
    rescale = tl.exp2(largest - new_largest)
    exponentials = tl.exp2(tile - new_largest[:, None])
    return exponentials, rescale, new_largest, total * rescale + tl.sum(exponentials, axis=1)
