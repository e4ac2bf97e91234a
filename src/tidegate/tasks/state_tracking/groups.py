"""Words in a group: multiply the elements that come in; which one is the product so far?"""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Generator, Tensor

from tidegate.tasks.targets import check_sizes, unscored

GROUPS = ("S3", "S4", "S5", "A4", "A5", "Z2", "Z3", "Z60")  # examples; any S, A and Z with a number goes
MOVES = ("all", "swaps", "swaps and 3-cycles")
_LARGEST = 5000  # elements: a table of 100 MB

Permutation = tuple[int, ...]


def group_words(
    batch: int,
    generator: Generator,
    *,
    group: str = "S3",
    length: int = 16,
    moves: str = "all",
    fillers: int = 0,
    bos: bool = True,
) -> tuple[Tensor, Tensor]:
    """Random elements of a group, and at each of them the product so far.

    Later elements act later, so they stand on the left: p_t = g_t p_{t-1}, (g p)(i) = g(p(i)). `group` is a symmetric
    group "S3", an alternating one "A5" or a cyclic one "Z60". `moves` are "all" elements, or of a symmetric group only
    "swaps" (those of two things, and the identity) or "swaps and 3-cycles". With `fillers` that many filler tokens
    stand behind each element, and the product is asked for on the last: time to think.

    Returns ids and targets, both (batch, length (1 + fillers) + 1), without `bos` one less. Tokens: the elements
    0 ... n - 1 (in the order of `group_elements`), BOS n, the filler n + 1; targets are elements, IGNORE elsewhere.

    >>> ids, targets = group_words(1, torch.Generator().manual_seed(0), group="Z3", length=4)
    >>> ids.tolist(), targets.tolist()
    ([[3, 2, 0, 2, 0]], [[-100, 2, 2, 1, 1]])
    """
    check_sizes(batch=batch, length=length)
    if fillers < 0:
        raise ValueError(f"fillers: seen {fillers}, wanted at least 0")
    table, chosen = multiplication_table(group), _moves(group, moves)
    word = chosen[torch.randint(len(chosen), (batch, length), generator=generator)]
    products = [word[:, 0]]
    for element in word.unbind(1)[1:]:
        products.append(table[element, products[-1]])

    ids = torch.full((batch, length, 1 + fillers), len(table) + 1)
    ids[:, :, 0] = word
    targets = unscored(batch, length, 1 + fillers)
    targets[:, :, -1] = torch.stack(products, 1)
    ids, targets = ids.flatten(1), targets.flatten(1)
    if bos:
        ids = torch.cat([torch.full((batch, 1), len(table)), ids], 1)
        targets = torch.cat([unscored(batch, 1), targets], 1)
    return ids, targets


def multiplication_table(group: str) -> Tensor:
    """(n, n) element numbers: entry [g, h] is the product g h, h first and then g.

    >>> multiplication_table("Z3").tolist()
    [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    """
    return _table(group)


def group_elements(group: str) -> list[Permutation]:
    """The elements as permutations, g[i] being where thing i goes: in lexical order, of "Z..." by the shift.

    The first element is the identity.

    >>> group_elements("S3")
    [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    >>> len(group_elements("A5"))
    60
    """
    family, size = group[:1], group[1:]
    if family not in ("S", "A", "Z") or not size.isdigit() or int(size) < 1:
        raise ValueError(f"group: seen {group!r}, wanted S, A or Z and a number, such as {', '.join(GROUPS)}")
    things = int(size)
    if (things if family == "Z" else torch.arange(1, min(things, 9) + 1).prod().item()) > _LARGEST:
        raise ValueError(f"group: {group} has more than {_LARGEST} elements, wanted a smaller one")
    if family == "Z":
        return [tuple((i + shift) % things for i in range(things)) for shift in range(things)]
    every = itertools.permutations(range(things))
    return [p for p in every if family == "S" or _inversions(p) % 2 == 0]


@functools.cache
def _table(group: str) -> Tensor:
    elements = group_elements(group)
    number = {element: index for index, element in enumerate(elements)}
    if group.startswith("Z"):
        index = torch.arange(len(elements))
        return (index[:, None] + index) % len(elements)
    return torch.tensor([[number[tuple(g[i] for i in h)] for h in elements] for g in elements])


def _moves(group: str, moves: str) -> Tensor:
    """The numbers of the elements that words are made of."""
    if moves not in MOVES:
        raise ValueError(f"moves: seen {moves!r}, wanted one of {', '.join(map(repr, MOVES))}")
    if moves != "all" and not group.startswith("S"):
        raise ValueError(f"moves: {moves!r} belong to a symmetric group such as S5, not to {group}; use 'all'")
    most = {"all": len(group), "swaps": 2, "swaps and 3-cycles": 3}[moves]
    moved = [sum(i != p for i, p in enumerate(element)) for element in group_elements(group)]
    return torch.tensor([index for index, count in enumerate(moved) if moves == "all" or count <= most])


def _inversions(permutation: Permutation) -> int:
    return sum(a > b for a, b in itertools.combinations(permutation, 2))
