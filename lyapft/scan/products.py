"""Products of small matrices inside a compiled kernel: rows of lanes in scratch memory, sums kept in registers.

A matrix is rows of whole lane blocks, `step` numbers from one row to the next; the number of rows is a multiple of 4.
BLAS cannot be called here: it has threads of its own, and its calls cost more than these matrices are worth.
"""

# mypy: ignore-errors
# (numba types these functions, and refuses what does not fit)

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lyapft.compiled import helper
from lyapft.scan.simd import (
    VECTOR,
    WIDTH,
    address,
    copy_transposed,
    multiply_add,
    splatted,
)

ROWS = 4  # rows of a block of sums
# Lane blocks of a block of sums: 16 registers of AVX-512's 32, or 8 of AVX2's 16, and room for what is multiplied.
BLOCKS = 4 if binding.get_host_cpu_features().get("avx512f") else 1

FULL, LOWER, UPPER = 0, 1, 2  # which part of the left matrix is not zero


def _block(blocks: int):
    """An intrinsic that adds a product to `ROWS` rows of `blocks` lane blocks."""

    @intrinsic
    def add_product(typingctx, scratch, out, out_step, left, left_row, left_k, right, right_step, k0, k1):
        """out[i, j] += sum of left[i·left_row + k·left_k] right[k·right_step + j] over k0 <= k < k1."""

        def generate(context, builder, signature, args):
            scratch, out, out_step, left, left_row, left_k, right, right_step, k0, k1 = args
            kind, index = signature.args[0], k0.type

            def place(at, offset, vector=VECTOR):
                return address(context, builder, kind, scratch, builder.add(at, offset), vector)

            def across(block):
                return ir.Constant(index, block * WIDTH)

            def down(row, step):
                return builder.mul(ir.Constant(index, row), step)

            places = {
                (row, block): place(builder.add(out, down(row, out_step)), across(block))
                for row in range(ROWS)
                for block in range(blocks)
            }
            sums = {at: cgutils.alloca_once_value(builder, builder.load(p, align=4)) for at, p in places.items()}
            with cgutils.for_range_slice(builder, k0, k1, ir.Constant(index, 1), intp=index) as (k, _):
                base = builder.add(right, builder.mul(k, right_step))
                rights = [builder.load(place(base, across(block)), align=4) for block in range(blocks)]
                base = builder.add(left, builder.mul(k, left_k))
                for row in range(ROWS):
                    one = builder.load(place(base, down(row, left_row), ir.FloatType()), align=4)
                    factor = splatted(builder, one)
                    for block in range(blocks):
                        total = sums[row, block]
                        builder.store(multiply_add(builder, factor, rights[block], builder.load(total)), total)
            for at, p in places.items():
                builder.store(builder.load(sums[at]), p, align=4)
            return context.get_dummy_value()

        return types.none(scratch, *[types.intp] * 9), generate

    return add_product


_one, _two, _three, _four = (_block(blocks) for blocks in (1, 2, 3, 4))


@helper
def multiply(scratch, out, out_step, rows, columns, left, left_row, left_k, right, right_step, depth, part, only_lower):
    """out (rows, columns) += left (rows, depth) · right (depth, columns), each at a place in scratch.

    Args:
        left_row, left_k: from a row of the left matrix to the next, and from a column: exchanged, it is transposed.
        part: FULL, or which part of the (transposed) left matrix is not zero.
        only_lower: leave out what lies in lane blocks above the diagonal of the result.
    """
    for i in range(0, rows, ROWS):
        k0, k1 = (i if part == UPPER else 0), (min(depth, i + ROWS) if part == LOWER else depth)
        end = min(columns, -(-(i + ROWS) // WIDTH) * WIDTH) if only_lower else columns
        a, o, j = left + i * left_row, out + i * out_step, 0
        while j < end:
            blocks = min(BLOCKS, (end - j) // WIDTH)
            if blocks == 4:
                _four(scratch, o + j, out_step, a, left_row, left_k, right + j, right_step, k0, k1)
            elif blocks == 3:
                _three(scratch, o + j, out_step, a, left_row, left_k, right + j, right_step, k0, k1)
            elif blocks == 2:
                _two(scratch, o + j, out_step, a, left_row, left_k, right + j, right_step, k0, k1)
            else:
                _one(scratch, o + j, out_step, a, left_row, left_k, right + j, right_step, k0, k1)
            j += blocks * WIDTH


@helper
def transpose(target, to, to_step, source, of, of_step, rows, columns):
    """target (columns, rows) = source (rows, columns) transposed; both are multiples of 16."""
    for i in range(0, rows, WIDTH):
        for j in range(0, columns, WIDTH):
            copy_transposed(target, to + j * to_step + i, to_step, source, of + i * of_step + j, of_step)
