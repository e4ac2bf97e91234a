"""What the step machine does with one row of numbers: its instructions, and a loop for each."""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np

from tidegate.ops.kernels import exp32, jit_views, wide_vectors


class Op(IntEnum):
    """Instructions; the numbers group them."""

    # moving
    COPY = 0
    TO_DOUBLE = 1
    TO_FLOAT = 2
    INT_TO_DOUBLE = 3
    DOUBLE_TO_INT = 4
    BYTE_TO_FLOAT = 5
    # one operand
    EXP = 10
    LOG = 11
    LOG1P = 12
    EXPM1 = 13
    SIN = 14
    COS = 15
    TANH = 16
    SIGMOID = 17
    RSQRT = 18
    SQRT = 19
    NEG = 20
    ABS = 21
    SQUARE = 22
    FLOOR = 23
    ERF = 24
    NOT = 25
    RECIPROCAL = 26
    # two operands; the second may be one number for the whole row
    ADD = 40
    SUB = 41
    MUL = 42
    DIV = 43
    MAX = 44
    MIN = 45
    LT = 46
    LE = 47
    EQ = 48
    NE = 49
    POW = 50
    # three or four operands
    FMA = 60  # a * b + c; a may be one number for the whole row
    WHERE = 61
    TWO_PRODUCTS = 62  # a * b + c * d; a and c may be one number for the whole row
    # a row to a number
    SUM = 70
    ROW_MAX = 71
    ROW_MIN = 72
    # products and tables
    MATMUL = 80
    ROWS = 81  # rows of a table, by int64 indices


@jit_views
def unary(op, n, x, o):
    """o = op(x), two float32 arrays."""
    wide_vectors()
    one = np.float32(1.0)
    if op == Op.EXP:
        for i in range(n):
            o[i] = exp32(x[i])
    elif op == Op.LOG:
        for i in range(n):
            o[i] = math.log(x[i])
    elif op == Op.LOG1P:
        for i in range(n):
            o[i] = math.log1p(x[i])
    elif op == Op.EXPM1:
        for i in range(n):
            o[i] = math.expm1(x[i])
    elif op == Op.SIN:
        for i in range(n):
            o[i] = math.sin(x[i])
    elif op == Op.COS:
        for i in range(n):
            o[i] = math.cos(x[i])
    elif op == Op.TANH:
        for i in range(n):
            o[i] = math.tanh(x[i])
    elif op == Op.SIGMOID:
        for i in range(n):
            o[i] = one / (one + exp32(-x[i]))
    elif op == Op.RSQRT:
        for i in range(n):
            o[i] = one / np.float32(math.sqrt(x[i]))
    elif op == Op.SQRT:
        for i in range(n):
            o[i] = math.sqrt(x[i])
    elif op == Op.NEG:
        for i in range(n):
            o[i] = -x[i]
    elif op == Op.ABS:
        for i in range(n):
            o[i] = abs(x[i])
    elif op == Op.SQUARE:
        for i in range(n):
            o[i] = x[i] * x[i]
    elif op == Op.FLOOR:
        for i in range(n):
            o[i] = math.floor(x[i])
    elif op == Op.ERF:
        for i in range(n):
            o[i] = math.erf(x[i])
    elif op == Op.NOT:
        for i in range(n):
            o[i] = one - x[i]
    elif op == Op.RECIPROCAL:
        for i in range(n):
            o[i] = one / x[i]


@jit_views
def binary(op, n, a, b, o):
    """o = a op b, float32."""
    wide_vectors()
    yes, no = np.float32(1.0), np.float32(0.0)
    if op == Op.ADD:
        for i in range(n):
            o[i] = a[i] + b[i]
    elif op == Op.SUB:
        for i in range(n):
            o[i] = a[i] - b[i]
    elif op == Op.MUL:
        for i in range(n):
            o[i] = a[i] * b[i]
    elif op == Op.DIV:
        for i in range(n):
            o[i] = a[i] / b[i]
    elif op == Op.MAX:
        for i in range(n):
            o[i] = a[i] if a[i] >= b[i] or a[i] != a[i] else b[i]
    elif op == Op.MIN:
        for i in range(n):
            o[i] = a[i] if a[i] <= b[i] or a[i] != a[i] else b[i]
    elif op == Op.LT:
        for i in range(n):
            o[i] = yes if a[i] < b[i] else no
    elif op == Op.LE:
        for i in range(n):
            o[i] = yes if a[i] <= b[i] else no
    elif op == Op.EQ:
        for i in range(n):
            o[i] = yes if a[i] == b[i] else no
    elif op == Op.NE:
        for i in range(n):
            o[i] = yes if a[i] != b[i] else no
    elif op == Op.POW:
        for i in range(n):
            o[i] = math.pow(a[i], b[i])


@jit_views
def scaled(op, n, a, b, o):
    """o = a op b for one number b, of the instructions common enough to have a loop of their own."""
    wide_vectors()
    if op == Op.ADD:
        for i in range(n):
            o[i] = a[i] + b
    elif op == Op.SUB:
        for i in range(n):
            o[i] = a[i] - b
    else:
        for i in range(n):
            o[i] = a[i] * b


@jit_views
def double(op, a, b, c):
    """One float64 number: positions and angles are few."""
    if op == Op.COPY:
        return a
    if op == Op.EXP:
        return math.exp(a)
    if op == Op.LOG:
        return math.log(a)
    if op == Op.LOG1P:
        return math.log1p(a)
    if op == Op.EXPM1:
        return math.expm1(a)
    if op == Op.SIN:
        return math.sin(a)
    if op == Op.COS:
        return math.cos(a)
    if op == Op.TANH:
        return math.tanh(a)
    if op == Op.SIGMOID:
        return 1.0 / (1.0 + math.exp(-a))
    if op == Op.RSQRT:
        return 1.0 / math.sqrt(a)
    if op == Op.SQRT:
        return math.sqrt(a)
    if op == Op.NEG:
        return -a
    if op == Op.ABS:
        return abs(a)
    if op == Op.SQUARE:
        return a * a
    if op == Op.FLOOR:
        return math.floor(a)
    if op == Op.ERF:
        return math.erf(a)
    if op == Op.NOT:
        return 1.0 - a
    if op == Op.RECIPROCAL:
        return 1.0 / a
    if op == Op.ADD:
        return a + b
    if op == Op.SUB:
        return a - b
    if op == Op.MUL:
        return a * b
    if op == Op.DIV:
        return a / b
    if op == Op.MAX:
        return a if a >= b or a != a else b
    if op == Op.MIN:
        return a if a <= b or a != a else b
    if op == Op.LT:
        return 1.0 if a < b else 0.0
    if op == Op.LE:
        return 1.0 if a <= b else 0.0
    if op == Op.EQ:
        return 1.0 if a == b else 0.0
    if op == Op.NE:
        return 1.0 if a != b else 0.0
    if op == Op.POW:
        return math.pow(a, b)
    if op == Op.FMA:
        return a * b + c
    return b if a != 0.0 else c
