"""The products and passes that the kernels consist of."""

from __future__ import annotations

from tidegate.ops.passes import elementwise
from tidegate.ops.tiles import product

# -- products ----------------------------------------------------------------------------------------------------------
scores = product(keep="lower", narrow=True)  # tril(A B)
read_earlier = product(shape="lower")  # A B + A2 B2 with A2 lower triangular
read_later = product(shape="upper")
read_earlier_scaled = product(shape="lower", finish="matrix")
read_later_scaled = product(shape="upper", finish="matrix")
write_rows = product(start="add", finish="rows")  # the state and its factors, one per row
write_columns = product(start="add", finish="matrix")


# -- passes: a chunk's rows ------------------------------------------------------------------------------------------
def _rows(e, inverse, q, k, scale):
    return q * e * scale, k * inverse


def _rows_of_logs(logs, q, k, scale):
    return _rows(*logs.exp_and_inverse(), q, k, scale)


def _keys(e, inverse, k, scale):
    return k * inverse, e * scale


def _keys_of_logs(logs, k, scale):
    return _keys(*logs.exp_and_inverse(), k, scale)


def _all(e, inverse, q, k, scale):
    return q * e * scale, k * inverse, inverse + 0.0


def _all_of_logs(logs, q, k, scale):
    return _all(*logs.exp_and_inverse(), q, k, scale)


def _difference(q, dq, k, dk):
    return q * dq - k * dk


def _accumulate(total, q, dq, k, dk):
    total = total + (q * dq - k * dk)
    return total, total


rows, rows_of_logs = elementwise(_rows), elementwise(_rows_of_logs)
keys, keys_of_logs = elementwise(_keys), elementwise(_keys_of_logs)
all_, all_of_logs = elementwise(_all), elementwise(_all_of_logs)
sum_of_differences, accumulate = elementwise(_difference, total=True), elementwise(_accumulate, carry=True)
