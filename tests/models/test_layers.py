"""The pattern that says which mixer stands where."""

from __future__ import annotations

import pytest

from tidegate.models.layers import expand, parse

A, S = "attention", "sliding-window-attention"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("attention", [A]),
        ("3*attention", [A] * 3),
        ("2*attention,1*sliding-window-attention", [A, A, S]),
        ("2*attention,sliding-window-attention x 2", [A, A, S] * 2),
        ("(2*attention,sliding-window-attention) x 2", [A, A, S] * 2),
        ("(attention,sliding-window-attention)x2,attention", [A, S, A, S, A]),
        ("2*(attention,sliding-window-attention),attention", [A, S, A, S, A]),
        ("  attention ,\n attention x2 ", [A] * 4),
        ("((attention x 2), sliding-window-attention) x 2", [A, A, S] * 2),
    ],
)
def test_patterns(pattern, names):
    assert expand(pattern) == names


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("atention", "there is no 'atention', did you mean 'attention'"),
        ("0*attention", "count 0 in '0\\*attention' must be at least 1"),
        ("attention x 0", "count 0"),
        ("3 attention", "seen 'attention' where it makes no sense"),
        ("attention attention", "seen 'attention' where it makes no sense"),
        ("attention,", "seen the end"),
        ("", "seen the end"),
        ("(attention", "a '\\)' is missing"),
        ("attention)", "seen '\\)'"),
        ("attention; attention", "cannot read '; attention'"),
        ("-1*attention", "cannot read '-1"),
        ([], "the list is empty"),
        ([("attention", 3)], "wanted a mixer's name or a pair"),
        ([7], "wanted a mixer's name or a pair"),
        ([("attention", {"num_head": 2})], "no option 'num_head', did you mean 'num_heads'"),
        ([("attention", {"dim": 2})], "'dim'"),
    ],
)
def test_errors_teach(layers, message):
    with pytest.raises(ValueError, match=message):
        parse(layers)


def test_options_go_with_their_entry():
    layers = parse([A, ("2*sliding-window-attention", {"window": 3}), [A, {"num_heads": 2}]])
    assert layers == [(A, {}), (S, {"window": 3}), (S, {"window": 3}), (A, {"num_heads": 2})]
    layers[1][1]["window"] = 4
    assert layers[2][1]["window"] == 3
