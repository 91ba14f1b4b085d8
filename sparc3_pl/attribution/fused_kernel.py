"""The Triton kernel of ``fused``: a matrix product that ends in the sums of |W * G| and never writes G.

Importing this module imports Triton. Whether it is compiled or interpreted (``TRITON_INTERPRET=1``) is settled then.
"""

import triton
import triton.language as tl

__all__ = ["relevance_kernel"]


@triton.jit
def _block(num_O, num_I, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, GROUP: tl.constexpr):
    """This program's row block and column block.

    Programs that run together share GROUP row blocks of delta and few column blocks of x: most comes from the L2 cache.
    """
    blocks_O, blocks_I = tl.cdiv(num_O, BLOCK_O), tl.cdiv(num_I, BLOCK_I)
    program = tl.program_id(0)
    first = program // (GROUP * blocks_I) * GROUP
    size = min(blocks_O - first, GROUP)
    within = program % (GROUP * blocks_I)
    return first + within % size, within // size


# T changes with every batch of prompts: no new compilation for it. A batch of one is compiled apart, without a loop.
@triton.jit(do_not_specialize=["num_T"])
def relevance_kernel(
    x, delta, weight, total, rows,
    num_B, num_T, num_O, num_I,
    x_b, x_t, x_i, delta_b, delta_t, delta_o, weight_o, weight_i,
    ADD: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile ``[BLOCK_O, BLOCK_I]`` of |W * G_b|, G_b = delta_b^T x_b, of one sample b of the batch after the other.

    A program owns its tile: nothing is atomic, the order of every sum is fixed, and ``total`` is read and written once.

    Args:
        x: ``[B, T, I]``; float32, bfloat16 or float16, with any strides (``x_b``, ``x_t``, ``x_i``: in elements).
        delta: ``[B, T, O]``, x's dtype.
        weight: ``[O, I]``.
        total: ``[O, I]`` float32, contiguous: with ``ADD`` the sum over the samples is added to it; else not touched.
        rows: ``[B, ceil(I / BLOCK_I), O]`` float32, contiguous: receives each sample's row sums of each column block.
        WIDEN: Multiply in float32, for Triton's interpreter: in a product it takes a bfloat16's bits for an integer.
    """
    block_o, block_i = _block(num_O, num_I, BLOCK_O, BLOCK_I, GROUP)
    # Where a tile begins is one 64-bit number; places within it are 32-bit: fewer registers for the addresses.
    first_o, first_i = tl.cast(block_o, tl.int64) * BLOCK_O, tl.cast(block_i, tl.int64) * BLOCK_I
    o, i, t = tl.arange(0, BLOCK_O), tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_T)
    in_o, in_i = o < num_O - block_o * BLOCK_O, i < num_I - block_i * BLOCK_I
    inside = in_o[:, None] & in_i[None, :]
    if ADD:
        batch = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    for b in range(num_B):
        sample = tl.cast(b, tl.int64)
        deltas = delta + sample * delta_b + first_o * delta_o
        inputs = x + sample * x_b + first_i * x_i
        gradient = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for start in range(0, num_T, BLOCK_T):
            in_t = t < num_T - start
            left = tl.load(deltas + (o[:, None] * delta_o + t[None, :] * delta_t), in_o[:, None] & in_t[None, :], 0.0)
            right = tl.load(inputs + (t[:, None] * x_t + i[None, :] * x_i), in_t[:, None] & in_i[None, :], 0.0)
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            # "ieee": float32 factors are not cut to TF32; half precision is exact in float32 anyway
            gradient = tl.dot(left, right, gradient, input_precision="ieee")
            deltas += BLOCK_T * delta_t
            inputs += BLOCK_T * x_t
        weights = weight + first_o * weight_o + first_i * weight_i + (o[:, None] * weight_o + i[None, :] * weight_i)
        relevance = tl.abs(gradient * tl.load(weights, inside, 0.0).to(tl.float32))
        row_sums = rows + (sample * tl.cdiv(num_I, BLOCK_I) + block_i) * num_O + first_o
        tl.store(row_sums + o, tl.sum(relevance, 1), in_o)
        if ADD:
            batch += relevance
    if ADD:
        totals = total + first_o * num_I + first_i + (o[:, None] * num_I + i[None, :])
        tl.store(totals, tl.load(totals, inside, 0.0) + batch, inside)
