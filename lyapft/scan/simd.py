"""A 16-lane float32 vector for numba kernels, and the elementary functions that a scan needs on it.

Numba has no vector type and allocates small arrays on the heap, where LLVM cannot keep them in registers. `lanes` is
one LLVM `<16 x float>`: a register pair with AVX2, one register with AVX-512, four with NEON or SSE. All functions
here are compiled into their caller. NaN and infinity in an operand reach the result. Numba's cache of a kernel sees
its own file only: kernels hold `DIGEST`, of all files whose functions they may take in, in a closure variable, which is
part of the key.
"""

# mypy: ignore-errors
# (numba types these functions, and refuses what does not fit)

import hashlib
import math
from pathlib import Path

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

WIDTH = 16
SOURCES = [
    Path(__file__).with_name(name)
    for name in ("simd.py", "tiles.py", "selective_scan_forward.py", "products.py", "ssd_forward.py")
]
DIGEST = int(hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:15], 16)
LOG2E = math.log2(math.e)
LN2 = math.log(2.0)

VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
_INTEGERS = ir.VectorType(ir.IntType(32), WIDTH)
_FLOAT = ir.FloatType()


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"lanes_float32x{WIDTH}")


lanes = _Lanes()


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type) -> None:
        super().__init__(dmm, fe_type, VECTOR)


def _constant(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [value] * WIDTH)


def multiply_add(builder, a, b, c):
    """LLVM: a·b + c of three vectors, with one rounding where the processor can."""
    function_type = ir.FunctionType(VECTOR, [VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.fmuladd.v{WIDTH}f32")
    return builder.call(function, [a, b, c])


def address(context, builder, array_type, array, index, vector_type=VECTOR):
    """LLVM: where array[index] of a flat float32 array begins, as a pointer to that type."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector_type.as_pointer())


@intrinsic
def load(typingctx, array, index):
    """The lanes at array[index : index + 16] of a flat contiguous float32 array (no bounds check)."""

    def generate(context, builder, signature, args):
        return builder.load(address(context, builder, signature.args[0], *args), align=4)

    return lanes(array, types.intp), generate


@intrinsic
def store(typingctx, array, index, value):
    """array[index : index + 16] = value (no bounds check)."""

    def generate(context, builder, signature, args):
        builder.store(args[2], address(context, builder, signature.args[0], args[0], args[1]), align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, lanes), generate


@intrinsic
def splat(typingctx, scalar):
    """All lanes equal to one float32."""
    return lanes(types.float32), lambda context, builder, signature, args: splatted(builder, args[0])


def splatted(builder, scalar):
    """LLVM: a vector of 16 times the same float32."""
    single = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(single, ir.Constant(VECTOR, ir.Undefined), ir.Constant(_INTEGERS, [0] * WIDTH))


@intrinsic
def broadcast(typingctx, array, index):
    """All lanes equal to array[index] of a flat contiguous float32 array (no bounds check, no index from the end)."""

    def generate(context, builder, signature, args):
        return splatted(builder, builder.load(address(context, builder, signature.args[0], *args, _FLOAT), align=4))

    return lanes(array, types.intp), generate


def _exchanged(builder, a, b, step):
    """Rows a and b after the exchange of the blocks of `step` lanes that cross the diagonal (Eklundh 1972)."""
    low = [lane if not lane & step else WIDTH + lane - step for lane in range(WIDTH)]
    high = [lane + step if not lane & step else WIDTH + lane for lane in range(WIDTH)]
    return [builder.shuffle_vector(a, b, ir.Constant(_INTEGERS, order)) for order in (low, high)]


def _transposed(builder, rows):
    """The 16 x 16 transpose by exchanging ever larger blocks of pairs of rows."""
    for step in (1, 2, 4, 8):
        for i in (i for i in range(WIDTH) if not i & step):
            rows[i], rows[i + step] = _exchanged(builder, rows[i], rows[i + step], step)
    return rows


@intrinsic
def copy_transposed(typingctx, target, at, target_step, source, base, source_step):
    """target[at + i·target_step + w] = source[base + w·source_step + i] for i, w < 16 (no bounds check)."""

    def generate(context, builder, signature, args):
        target, at, target_step, source, base, source_step = args
        rows = []
        for _ in range(WIDTH):
            rows.append(builder.load(address(context, builder, signature.args[3], source, base), align=4))
            base = builder.add(base, source_step)
        for row in _transposed(builder, rows):
            builder.store(row, address(context, builder, signature.args[0], target, at), align=4)
            at = builder.add(at, target_step)
        return context.get_dummy_value()

    return types.none(target, types.intp, types.intp, source, types.intp, types.intp), generate


def _binary(name: str):
    def typed(typingctx, a, b):
        def generate(context, builder, signature, args):
            return getattr(builder, name)(*args)

        return lanes(lanes, lanes), generate

    typed.__name__ = name
    return intrinsic(typed)


add, sub, mul, div = _binary("fadd"), _binary("fsub"), _binary("fmul"), _binary("fdiv")


@intrinsic
def fma(typingctx, a, b, c):
    """a·b + c, with one rounding where the processor can."""

    def generate(context, builder, signature, args):
        return multiply_add(builder, *args)

    return lanes(lanes, lanes, lanes), generate


@intrinsic
def flush_tiny(typingctx, value):
    """value, but 0 where |value| < 1e-36: keeps a decaying state out of the slow subnormal numbers."""

    def generate(context, builder, signature, args):
        large = builder.fcmp_unordered(">=", _magnitude(builder, args[0]), _constant(1e-36))
        return builder.select(large, args[0], _constant(0.0))

    return lanes(lanes), generate


@intrinsic
def totals(typingctx, array, at):
    """Lane j = sum of array[at + 16 j : at + 16 j + 16], by a fixed binary tree: a transpose that adds."""

    def generate(context, builder, signature, args):
        rows = []
        for j in range(WIDTH):
            index = builder.add(args[1], ir.Constant(args[1].type, j * WIDTH))
            rows.append(builder.load(address(context, builder, signature.args[0], args[0], index), align=4))
        for step in (1, 2, 4, 8):
            pairs = zip(rows[::2], rows[1::2], strict=True)
            rows = [builder.fadd(*_exchanged(builder, a, b, step)) for a, b in pairs]
        return rows[0]

    return lanes(array, types.intp), generate


def _magnitude(builder, value):
    bits = builder.and_(builder.bitcast(value, _INTEGERS), ir.Constant(_INTEGERS, [0x7FFFFFFF] * WIDTH))
    return builder.bitcast(bits, VECTOR)


def _horner(builder, x, coefficients):
    result = _constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = multiply_add(builder, result, x, _constant(coefficient))
    return result


# (2^f - 1)/f on |f| <= 1/2: Chebyshev fit, relative error 1.3e-8: 2^f - 1 keeps its digits as f -> 0.
_EXP2 = (
    0.6931471880293429,
    0.2402265092234272,
    0.05550357104252972,
    0.009618056669887258,
    0.0013390867351400178,
    0.00015461447462985332,
)
# 2·atanh(s)/s as a polynomial in s² on s² <= 1/9: relative error 4e-9.
_ATANH = (2.0000000078777496, 0.6666631593508041, 0.4002485372350835, 0.2796141883399917, 0.2817465726777882)
_MAGIC = 12582912.0 + 127.0  # 1.5·2^23 rounds to an integer; + 127 leaves the biased exponent in the low bits
_MAGIC_BITS = 0x4B400000 + 127


def _exp2_parts(builder, x):
    """scale 2^r, and u = 2^(x - r) - 1, for r = round(x) in [-127, 127]; the bits of 2^-127 are those of 0."""
    x = builder.select(builder.fcmp_ordered("<", x, _constant(-127.0)), _constant(-127.0), x)
    shifted = builder.fadd(x, _constant(_MAGIC))
    fraction = builder.fsub(x, builder.fsub(shifted, _constant(_MAGIC)))
    bits, highest = builder.bitcast(shifted, _INTEGERS), ir.Constant(_INTEGERS, [_MAGIC_BITS + 127] * WIDTH)
    bits = builder.select(builder.icmp_signed("<", bits, highest), bits, highest)
    scale = builder.shl(bits, ir.Constant(_INTEGERS, [23] * WIDTH))
    return builder.bitcast(scale, VECTOR), builder.fmul(fraction, _horner(builder, fraction, _EXP2))


@intrinsic
def exp2(typingctx, x):
    """2^x with relative error <= 2e-7 for -126.5 <= x <= 127.5; 0 below, at least 2^126 above."""

    def generate(context, builder, signature, args):
        scale, u = _exp2_parts(builder, args[0])
        return builder.fadd(scale, builder.fmul(scale, u))

    return lanes(lanes), generate


@intrinsic
def decay(typingctx, x):
    """(s, e) with 2^x = s + e, s the power of two nearest to 2^x: e = 2^x - 1 keeps its digits where s = 1.

    A decay close to 1 rounds to float32 with an error that returns at every token and adds up over the memory of the
    state. A product with s is exact, and what is multiplied by e is small.
    """

    def generate(context, builder, signature, args):
        scale, u = _exp2_parts(builder, args[0])
        return context.make_tuple(builder, signature.return_type, [scale, builder.fmul(scale, u)])

    return types.UniTuple(lanes, 2)(lanes), generate


@intrinsic
def log1p_unit(typingctx, t):
    """log(1 + t) for 0 <= t <= 1, relative error <= 2e-7: 2·atanh(t/(2 + t))."""

    def generate(context, builder, signature, args):
        s = builder.fdiv(args[0], builder.fadd(args[0], _constant(2.0)))
        return builder.fmul(s, _horner(builder, builder.fmul(s, s), _ATANH))

    return lanes(lanes), generate


@intrinsic
def magnitude(typingctx, value):
    """Absolute value."""

    def generate(context, builder, signature, args):
        return _magnitude(builder, args[0])

    return lanes(lanes), generate


@intrinsic
def positive_part(typingctx, value):
    """max(value, 0), NaN kept."""

    def generate(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<", args[0], _constant(0.0)), _constant(0.0), args[0])

    return lanes(lanes), generate
