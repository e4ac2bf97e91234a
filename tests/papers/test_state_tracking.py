"""What transitions can express, with weights set by hand: automata followed for 10,000 tokens in float32.

These are the theorems of "negative eigenvalues" (arXiv 2411.12537) and DeltaProduct (2502.10297) as numbers: they test
the ops, not an optimiser.
"""

from __future__ import annotations

import math

import pytest
import torch

from tidegate import mixers, ops
from tidegate.papers import Situation, deltaproduct, negative_eigenvalues
from tidegate.state import State
from tidegate.tasks.state_tracking import group_elements, group_words, parity

LONG = 10_000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def transform(keys, beta, start):
    """(T, V, K): what the reflections I - beta k k^T, one after the other, make of the columns of `start` (K, V).

    keys (T, n, K), beta (T, n).
    """
    size, count = start.shape
    read = torch.eye(size, dtype=keys.dtype).expand(len(keys), size, size)  # a head for every row of the state
    each = keys[None, :, :, None].expand(-1, -1, -1, size, -1)
    nothing = torch.zeros(*each.shape[:-1], count, dtype=keys.dtype)
    rates = beta[None, :, :, None].expand(-1, -1, -1, size)
    state = start.expand(1, size, size, count)
    return ops.delta_rule(read[None], each, nothing, rates, state=state)[0][0].mT


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def unit(angle):
    return torch.stack([angle.cos(), angle.sin()], -1)


# -- automata ----------------------------------------------------------------------------------------------------------
def test_a_scalar_that_changes_its_sign_counts_parity():
    bits, wanted = parity(2, generator(), length=LONG)
    h, _ = ops.scan((1.0 - 2 * bits)[..., None], bits[..., None].float())
    assert torch.equal(h[..., 0].long(), wanted)
    assert (h[..., 0] - wanted).abs().max() < 1e-3


@pytest.mark.parametrize("m", [3, 5])
def test_two_reflections_count_modulo_m(m):
    ids, sums = (part[0] for part in group_words(1, generator(), group=f"Z{m}", length=LONG, bos=False))
    keys = unit(torch.stack([torch.zeros(LONG), ids * math.pi / m], 1))
    seen = transform(keys, torch.full((LONG, 2), 2.0), torch.tensor([[1.0], [0.0]]))[:, 0]
    assert (seen - unit(2 * math.pi * sums / m)).abs().max() < 1e-3


def test_one_reflection_swaps_two_things():
    ids, products = group_words(1, generator(), group="S5", moves="swaps", length=LONG, bos=False)
    elements = torch.tensor(group_elements("S5"))
    moved = elements[ids[0]] != torch.arange(5)
    signs = torch.where(moved.cumsum(1) == 1, 1.0, -1.0)
    keys = torch.where(moved, signs, 0)[:, None] / math.sqrt(2)
    beta = torch.where(moved.any(1), 2.0, 0.0)[:, None]
    seen = transform(keys, beta, torch.eye(5))  # a row per thing: where it is
    assert (seen - torch.nn.functional.one_hot(elements[products[0]], 5)).abs().max() < 1e-3


def reflections_of(permutation):
    """Keys (4, 5) and betas (4,): swaps that put the things of S5 in their places, the first to act first."""
    keys, beta, now = torch.zeros(4, 5), torch.zeros(4), list(permutation)
    keys[:, 0] = 1
    swaps = []
    for place in range(5):
        if now[place] != place:
            at = now.index(place)
            swaps.append((now[place], place))
            now[place], now[at] = now[at], now[place]
    for index, (i, j) in enumerate(reversed(swaps)):
        keys[index] = 0
        keys[index, i], keys[index, j], beta[index] = 0.5**0.5, -(0.5**0.5), 2.0
    return keys, beta


def test_four_reflections_are_any_permutation_of_five_things():
    ids, products = group_words(1, generator(), group="S5", length=LONG, bos=False)
    elements = group_elements("S5")
    keys, beta = (torch.stack(part) for part in zip(*map(reflections_of, elements), strict=True))
    seen = transform(keys[ids[0]], beta[ids[0]], torch.eye(5))
    assert (seen - torch.nn.functional.one_hot(torch.tensor(elements)[products[0]], 5)).abs().max() < 1e-3


@pytest.mark.parametrize("m", [5, 7])
def test_two_layers_of_one_reflection_add_modulo_m(m):
    digits, sums = (part[0] for part in group_words(1, generator(), group=f"Z{m}", length=LONG, bos=False))
    odd = ops.scan(torch.tensor([-1.0]), torch.ones(1, LONG, 1))[0][0, :, 0]  # layer 1: the parity of time
    assert torch.equal(odd, (torch.arange(LONG) % 2 == 0).float())
    angle = torch.where(odd == 1, 1 - 2 * digits, 1 + 2 * digits) * math.pi / m
    keys = unit(angle / 2 + math.pi / 2)[:, None]  # alpha -> angle - alpha
    seen = transform(keys, torch.full((LONG, 1), 2.0), torch.tensor([[1.0], [0.0]]))[:, 0]
    wanted = torch.where(odd == 1, 1 - 2 * sums, 2 * sums) * math.pi / m
    assert (seen - unit(wanted)).abs().max() < 1e-3


# -- products of reflections -------------------------------------------------------------------------------------------
def transition(keys, beta):
    """The matrix P_n ... P_1 of one token, keys (n, K) and beta (n,)."""
    return transform(keys[None], beta[None], torch.eye(keys.shape[-1], dtype=keys.dtype))[0].T


def test_the_transition_is_the_product_in_the_papers_order():
    torch.manual_seed(0)
    keys, beta = torch.nn.functional.normalize(torch.randn(3, 4).double(), dim=-1), 2 * torch.rand(3).double()
    one, two, three = (torch.eye(4) - b * torch.outer(k, k) for k, b in zip(keys, beta, strict=True))
    torch.testing.assert_close(transition(keys, beta), three @ two @ one, rtol=1e-12, atol=1e-12)


def test_no_product_expands():
    torch.manual_seed(0)
    for _ in range(50):
        keys, beta = torch.nn.functional.normalize(torch.randn(4, 5).double(), dim=-1), 2 * torch.rand(4).double()
        assert torch.linalg.matrix_norm(transition(keys, beta), 2) <= 1 + 1e-12


def test_equal_keys_gain_nothing():
    torch.manual_seed(0)
    key = torch.nn.functional.normalize(torch.randn(4).double(), dim=-1)
    a, b = 1.7, 0.6
    both = transition(key.expand(2, 4), double(a, b))
    alone = transition(key[None], double(a + b - a * b))
    torch.testing.assert_close(both, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("theta", [0.3, 1.1])
def test_two_reflections_turn_by_twice_the_angle_between_their_keys(theta):
    keys = unit(double(0.2, 0.2 + theta))
    turn = transition(keys, double(2, 2))
    c, s = math.cos(2 * theta), math.sin(2 * theta)
    torch.testing.assert_close(turn, torch.tensor([[c, -s], [s, c]], dtype=torch.float64), rtol=1e-12, atol=1e-12)
    positive = torch.linalg.eigvals(transition(keys, double(1, 1)))
    assert positive.imag.abs().max() < 1e-12, "without beta > 1 there is no turning"


# -- the layers' option ------------------------------------------------------------------------------------------------
def decay_and_write(name, x, **options):
    """What one token does to the memory: the linear part A (on its first axis) and what it writes."""
    torch.manual_seed(0)
    mixer = mixers.build(name, dim=x.shape[-1], dtype=torch.float64, **options)
    state = mixer.init_state(len(x))
    with torch.no_grad():
        write = mixer(x, state)[1]["memory"]
        ones = torch.ones_like(write) if name == "mamba" else torch.eye(*write.shape[-2:]).double().expand_as(write)
        after = mixer(x, State({**state, "memory": ones}))[1]["memory"]
    return after - write, write


@pytest.mark.parametrize("name", ["deltanet", "deltaproduct"])
def test_the_option_doubles_the_step_and_the_write(name):
    x = 3 * torch.randn(64, 1, 8, generator=generator()).double()
    options = {"num_heads": 2, "conv_width": None, **({"num_steps": 1} if name == "deltaproduct" else {})}
    a, write = decay_and_write(name, x, negative_eigenvalues=False, **options)
    wide, wide_write = decay_and_write(name, x, negative_eigenvalues=True, **options)
    eye = torch.eye(4).double()
    torch.testing.assert_close(wide - eye, 2 * (a - eye), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(wide_write, 2 * write, rtol=1e-9, atol=1e-12)
    low, high = (torch.linalg.eigvalsh((m + m.mT) / 2).aminmax() for m in (a, wide))
    assert low.min >= -1e-12
    assert -1 <= high.min < -0.5
    assert max(low.max, high.max) <= 1 + 1e-12


def test_the_option_widens_mambas_decay_and_leaves_its_write():
    x = 3 * torch.randn(64, 1, 8, generator=generator()).double()
    a, write = decay_and_write("mamba", x, negative_eigenvalues=False)
    wide, wide_write = decay_and_write("mamba", x, negative_eigenvalues=True)
    torch.testing.assert_close(wide, 2 * a - 1, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(wide_write, write, rtol=1e-9, atol=1e-12)
    assert a.min() > 0 > wide.min()


# -- the papers --------------------------------------------------------------------------------------------------------
def test_the_step_loop_is_the_op():
    torch.manual_seed(0)
    q, k = torch.randn(2, 5, 3, 4).double(), torch.nn.functional.normalize(torch.randn(2, 5, 2, 3, 4).double(), dim=-1)
    v, beta = torch.randn(2, 5, 2, 3, 6).double(), 2 * torch.rand(2, 5, 2, 3).double()
    for seen, wanted in zip(deltaproduct.step_loop(q, k, v, beta), ops.delta_rule(q, k, v, beta), strict=True):
        torch.testing.assert_close(seen, wanted, rtol=1e-10, atol=1e-10)


def test_the_diagonal_model_is_its_recurrence():
    torch.manual_seed(0)
    model = negative_eigenvalues.Diagonal(2, 2, 8, negative=True)
    ids, _ = parity(3, generator(), length=9)
    x = model.embedding(ids)
    h, seen = torch.zeros(3, 8), []
    for t in range(9):
        h = (2 * model.gate(x[:, t]).sigmoid() - 1) * h + model.write(x[:, t])
        seen.append(model.head(h))
    torch.testing.assert_close(model(ids)[0], torch.stack(seen, 1))


@pytest.mark.parametrize("paper", [deltaproduct.PAPER, negative_eigenvalues.PAPER])
def test_every_system_is_measured_at_every_length(paper):
    for tried in paper.experiments:
        if tried.seeded:
            seen = tried.measure(0, Situation(smoke=True))
            for check in tried.checks:
                assert math.isfinite(check.measure(seen.numbers))
