"""HiPPO: linear systems x' = A x + B u whose state holds the past of u as coefficients in an orthogonal basis.

What a state space model starts from: the matrices, their normal-plus-low-rank form, their discretisation, their kernels
and bases. `tidegate.nn.projection` runs them over a signal.

Source: HiPPO, arXiv 2008.07669; How to Train Your HiPPO, 2206.12037.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MEASURES = ("legs", "legt", "lmu", "fout", "lagt", "glagt", "random")
WEIGHTS = {"forward": 0.0, "bilinear": 0.5, "backward": 1.0}  # of the step's end, in the generalised bilinear rule
RULES = (*WEIGHTS, "zoh")
_TILT = 0.01  # by how much "glagt" forgets faster than "lagt"


def transition(measure: str, states: int) -> tuple[Tensor, Tensor]:
    """A (N, N) and B (N,), float64, of the system x' = A x + B u that projects by a measure.

    - "legs": Legendre polynomials, scaled. A is lower triangular with eigenvalues -1 ... -N. As it stands it weighs the
      past by exp(-t); divided by the time, x' = (A x + B u) / t, it weighs all of the past alike, HiPPO's first memory.
    - "legt": Legendre polynomials on the last 2 units of time. "lmu" the same over 1 unit, in the coordinates of the
      Legendre memory unit.
    - "fout": sines and cosines on the last 2 units of time. N is even; state 1, the sine of frequency 0, stays 0.
    - "lagt": Laguerre functions, exp(-t / 2) times polynomials. "glagt" weighs the past by exp(-0.01 t) as well.
    - "random": what to compare with, a Gaussian matrix of spectral radius 1 minus the identity; the forward rule at
      step 1 makes it that Gaussian matrix.

    Raises ValueError for another measure, N < 1, and an odd N for "fout".

    >>> A, B = transition("lagt", 3)
    >>> A.tolist(), B.tolist()
    ([[-0.5, 0.0, 0.0], [-1.0, -0.5, 0.0], [-1.0, -1.0, -0.5]], [1.0, 1.0, 1.0])
    """
    _check(measure, states)
    n = torch.arange(states, dtype=torch.float64)
    root, ones = torch.sqrt(2 * n + 1), torch.ones(states, states, dtype=torch.float64)
    signs = 1 - 2 * (n % 2)
    alternating = torch.outer(signs, signs)
    if measure == "legs":
        return -torch.outer(root, root).tril(-1) - torch.diag(n + 1), root
    if measure == "legt":
        return -torch.outer(root, root) / 2 * (ones.tril() + alternating.triu(1)), root / 2
    if measure == "lmu":
        return -(2 * n + 1)[:, None] * (alternating.tril() + ones.triu(1)), (2 * n + 1) * signs
    if measure == "fout":
        B = torch.zeros(states, dtype=torch.float64)
        B[0::2] = math.sqrt(2)
        B[0] = 1
        return _rotation(states) - torch.outer(B, B), B
    if measure == "lagt":
        return torch.eye(states).double() / 2 - ones.tril(), ones[0]
    if measure == "glagt":
        return (1 - _TILT) / 2 * torch.eye(states).double() - ones.tril(), math.sqrt(_TILT) * ones[0]
    gaussian = torch.randn(states, states, dtype=torch.float64)
    radius = torch.linalg.eigvals(gaussian).abs().max()
    return gaussian / radius - torch.eye(states).double(), torch.randn(states, dtype=torch.float64)


def nplr(measure: str, states: int, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A as a normal matrix minus one of low rank, in the normal matrix's eigenbasis, as S4 and its relatives start.

    Equation::

        A = V (diag(eigenvalues) - P P^*) V^*        V unitary, B = V^* B_measure

    Returns eigenvalues (N,), P (N, rank), B (N,) and V (N, N), complex128. All eigenvalues have one real part: -1/2 for
    "legs", 0 for the others (-0.005 for "glagt"). Their imaginary parts ascend, so that for even N the first half holds
    one of each conjugate pair. S4D, DSS and S5 take the eigenvalues and leave the term of low rank out.

    The rank is 2 for "legt" and 1 for the others; a larger `rank` adds columns of zeros. Raises ValueError for a lower
    one, and for "lmu" and "random", which have no such form in an orthonormal basis.

    >>> eigenvalues, P, B, V = nplr("legs", 4)
    >>> [round(w, 2) for w in eigenvalues.imag.tolist()]
    [-4.6, -0.56, 0.56, 4.6]
    >>> A = V @ (torch.diag(eigenvalues) - P @ P.mH) @ V.mH
    >>> bool(torch.allclose(A.real, transition("legs", 4)[0]))
    True
    """
    A, B = transition(measure, states)
    n = torch.arange(states)
    root = torch.sqrt(n.double() + 0.5)
    if measure == "legs":
        columns = [root]
    elif measure == "legt":
        columns = [root * (n % 2), root * (1 - n % 2)]
    elif measure == "fout":
        columns = [B]
    elif measure in ("lagt", "glagt"):
        columns = [torch.full_like(root, math.sqrt(0.5))]
    else:
        raise ValueError(f"measure: {measure!r} has no normal-plus-low-rank form, wanted {_named(_NORMAL)}")
    if rank is not None and rank < len(columns):
        raise ValueError(f"rank: seen {rank}, but {measure!r} needs {len(columns)}")
    missing = 0 if rank is None else rank - len(columns)
    P = torch.stack([*columns, *[torch.zeros_like(root)] * missing], dim=1)
    normal = A + P @ P.T
    real = normal.diagonal().mean().round(decimals=9)  # what it is, without the rounding of the sums
    skew = normal - real * torch.eye(states).double()
    w, V = torch.linalg.eigh(-1j * skew)  # Hermitian, so that V is unitary to rounding whatever the spectrum
    if measure == "fout":
        # Two eigenvalues are 0, those of the first two coordinates; of all bases of that plane, a conjugate pair.
        middle = states // 2
        V[:, middle - 1 : middle + 1] = 0
        V[:2, middle - 1 : middle + 1] = torch.tensor([[1, 1], [1j, -1j]], dtype=V.dtype) / math.sqrt(2)
    return torch.complex(real.expand_as(w), w), V.mH @ P.to(V), V.mH @ B.to(V), V


_NORMAL = ("legs", "legt", "fout", "lagt", "glagt")


def discretise_dense(
    A: Tensor, B: Tensor, step: Tensor | float, rule: str | float = "bilinear"
) -> tuple[Tensor, Tensor]:
    """From x' = A x + B u to x_t = A_step x_{t-1} + B_step u_t.

    Equation, D the step::

        a number a in [0, 1]:   (I - a D A) x_t = (I + (1 - a) D A) x_{t-1} + D B u_t
        zoh:                    x_t = exp(D A) x_{t-1} + (integral of exp(s A) over [0, D]) B u_t

    "forward", "bilinear" and "backward" are a = 0, 1/2 and 1. "zoh" holds u over the step and is exact then, whether A
    can be inverted or not. Differentiable in A, B and the step.

    Shapes: A (..., N, N), B (..., N), step (...) broadcast in the leading axes. Raises ValueError for another rule.

    >>> A, B = discretise_dense(-torch.eye(1), torch.ones(1), 0.5, "zoh")
    >>> round(A.item(), 4), round(B.item(), 4)
    (0.6065, 0.3935)
    >>> A, B = discretise_dense(-torch.eye(1), torch.ones(1), 0.5, "bilinear")
    >>> round(A.item(), 4), round(B.item(), 4)
    (0.6, 0.4)
    """
    weight = rule_weight(rule)
    step = torch.as_tensor(step, dtype=A.dtype, device=A.device)[..., None, None]
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-1], step.shape[:-2])
    moved = step * torch.cat([A.expand(*batch, *A.shape[-2:]), B.expand(*batch, *B.shape[-1:])[..., None]], -1)
    if weight is None:
        # In float64, because PyTorch's exponential of float32 matrices has but four digits.
        whole = torch.nn.functional.pad(moved, (0, 0, 0, 1)).double()
        result = torch.linalg.matrix_exp(whole)[..., :-1, :].to(A.dtype)
    else:
        identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        before = torch.cat([identity + (1 - weight) * moved[..., :-1], moved[..., -1:]], -1)
        result = torch.linalg.solve(identity - weight * moved[..., :-1], before)
    return result[..., :-1], result[..., -1]


def rule_weight(rule: str | float) -> float | None:
    """The weight of the step's end in the generalised bilinear rule; None for "zoh". Raises ValueError otherwise."""
    if rule == "zoh":
        return None
    weight = WEIGHTS.get(rule) if isinstance(rule, str) else float(rule)
    if weight is None or not 0 <= weight <= 1:
        raise ValueError(f"rule: seen {rule!r}, wanted one of {', '.join(RULES)}, or a number in [0, 1]")
    return weight


def kernels(measure: str, states: int, times: Tensor) -> Tensor:
    """exp(t A) B at times (...,): what u, t units of time ago, has added to each coefficient; (..., N), float64.

    >>> ages = torch.tensor([0.5, 1.5, 2.5])
    >>> [round(k, 1) for k in kernels("legt", 16, ages)[:, 0].tolist()]
    [0.5, 0.5, 0.0]
    """
    A, B = transition(measure, states)
    return torch.linalg.matrix_exp(times.double()[..., None, None] * A) @ B


def basis(measure: str, states: int, ages: Tensor) -> Tensor:
    """The functions that coefficients are coefficients of: u(now - age) = sum_n basis_n(age) x_n; (..., N).

    Ages are in units of time, 0 is now: up to 2 for "legt" and "fout", up to 1 for "lmu". For "legs" as time-invariant
    system; that of x' = (A x + B u) / t has basis("legs", N, -log(1 - age / t)).

    >>> basis("lmu", 3, torch.tensor([0.0, 0.5, 1.0])).tolist()
    [[1.0, -1.0, 1.0], [1.0, 0.0, -0.5], [1.0, 1.0, 1.0]]
    """
    _check(measure, states)
    n = torch.arange(states, dtype=ages.dtype, device=ages.device)
    root = torch.sqrt(2 * n + 1)
    if measure == "legs":
        return root * _legendre(2 * torch.exp(-ages) - 1, states)
    if measure == "legt":
        return root * _legendre(1 - ages, states)
    if measure == "lmu":
        return _legendre(2 * ages - 1, states)
    if measure == "fout":
        angles = math.pi * ages[..., None] * n[: states // 2]
        waves = torch.stack([torch.cos(angles), torch.sin(angles)], -1).flatten(-2)
        return waves * torch.where(n == 0, 1.0, math.sqrt(2))
    if measure in ("lagt", "glagt"):
        tilt = _TILT if measure == "glagt" else 0.0
        scale = tilt**-0.5 if tilt else 1.0
        return scale * torch.exp((tilt - 1) / 2 * ages)[..., None] * _laguerre(ages, states)
    raise ValueError("measure: 'random' projects on no functions")


# -- parts -------------------------------------------------------------------------------------------------------------
def _check(measure: str, states: int) -> None:
    if measure not in MEASURES:
        raise ValueError(f"measure: seen {measure!r}, wanted {_named(MEASURES)}")
    if states < 1 or (measure == "fout" and states % 2):
        wanted = "an even number, for pairs of sine and cosine" if measure == "fout" else "at least 1"
        raise ValueError(f"states: seen {states}, wanted {wanted}")


def _named(names: tuple[str, ...]) -> str:
    return f"{', '.join(map(repr, names[:-1]))} or {names[-1]!r}"


def _rotation(states: int) -> Tensor:
    """Coordinates 2 m and 2 m + 1 turn into each other with angular frequency pi m."""
    frequencies = torch.zeros(states - 1, dtype=torch.float64)
    frequencies[0::2] = math.pi * torch.arange(states // 2, dtype=torch.float64)
    return torch.diag(frequencies, -1) - torch.diag(frequencies, 1)


def _legendre(x: Tensor, states: int) -> Tensor:
    """P_0(x) ... P_{N-1}(x) along a new last axis, by (n + 1) P_{n+1} = (2 n + 1) x P_n - n P_{n-1}."""
    values = [torch.ones_like(x), x]
    for n in range(1, states - 1):
        values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
    return torch.stack(values[:states], -1)


def _laguerre(x: Tensor, states: int) -> Tensor:
    """L_0(x) ... L_{N-1}(x) along a new last axis, by (n + 1) L_{n+1} = (2 n + 1 - x) L_n - n L_{n-1}."""
    values = [torch.ones_like(x), 1 - x]
    for n in range(1, states - 1):
        values.append(((2 * n + 1 - x) * values[n] - n * values[n - 1]) / (n + 1))
    return torch.stack(values[:states], -1)
