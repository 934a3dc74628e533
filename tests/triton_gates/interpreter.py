"""Triton's CPU interpreter made exact in bf16, for tests. Import it before a kernel runs.

The interpreter holds bf16 as uint16 and computes with the integers: products and sums are garbage, a cast from fp32
truncates. Here operands are widened to fp32 first and results rounded to the nearest. Reductions of bf16 stay wrong: a
kernel casts to fp32 after the load.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert, _dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
_binary = interpreter.InterpreterBuilder.binary_op


def widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values):
    """fp32 to the bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return np.where(np.isnan(values), np.uint16(0x7FC0), ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))


def _convert_float(values, source, to, rounding):
    if (source, to) == (tl.float32, tl.bfloat16):
        return rounded(values)
    if (source, to) == (tl.bfloat16, tl.float32):
        return widened(values).view(np.uint32)
    return _convert(values, source, to, rounding)


def _wide(handle):
    if handle.dtype.scalar == tl.bfloat16:
        return interpreter.TensorHandle(widened(handle.data), tl.float32)
    return handle


def _create_dot(self, a, b, d, *rest):
    return _dot(self, _wide(a), _wide(b), d, *rest)


def _binary_op(self, left, right, op):
    if left.dtype.scalar == right.dtype.scalar == tl.bfloat16:
        out = np.asarray(op(widened(left.data), widened(right.data)))
        if out.dtype == bool:
            return interpreter.TensorHandle(out, tl.int1)
        return interpreter.TensorHandle(rounded(out), tl.bfloat16)
    return _binary(self, left, right, op)


interpreter._convert_float = _convert_float
interpreter.InterpreterBuilder.create_dot = _create_dot
interpreter.InterpreterBuilder.binary_op = _binary_op
