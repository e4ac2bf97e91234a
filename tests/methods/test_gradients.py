"""The profile of gradients over time is the product of Jacobians, for states of every kind."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd.functional import vjp

from tests.contract.helpers import Subject
from tidegate import LanguageModel, State, mixers
from tidegate.methods.gradients import state_gradient_profile
from tidegate.nn.mixer import Mixer


class Fading(Mixer):
    """h_t = a * h_{t-1} + x_t, y_t = h_t, and a count of tokens."""

    def __init__(self, a):
        super().__init__()
        self.dim, self.a = len(a), torch.nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def state_spec(self):
        return {"h": (self.dim,), "seen": ((), torch.int64)}

    def forward(self, x, state=None, *, segments=None):
        x, state = self.prepare(x, state, segments)
        h, outputs = state["h"], []
        for now in x.unbind(1):
            h = self.a * h + now
            outputs.append(h)
        return torch.stack(outputs, 1), State(h=h, seen=state["seen"] + x.shape[1])


def test_a_linear_recurrence_has_powers_of_its_factor():
    x = torch.randn(3, 60, 1, dtype=torch.float64)
    direction = torch.tensor([[1.0], [-10.0], [0.5]], dtype=torch.float64)
    back = torch.arange(60, 0, -1)  # T - t
    for a in (0.5, 1.0, 1.25, -0.9):
        wanted = back * math.log10(abs(a)) + direction.abs().log10()
        torch.testing.assert_close(state_gradient_profile(Fading([a]), x, direction=direction), wanted)


def test_channels_are_summed_as_squares_and_the_starting_state_does_not_matter_to_what_is_linear():
    x, direction = torch.randn(2, 20, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    a = torch.tensor([0.3, 0.9, 1.1], dtype=torch.float64)
    powers = torch.arange(20, 0, -1)[:, None]
    wanted = (a**powers * direction[:, None]).norm(dim=-1).log10()
    mixer = Fading(a.tolist())
    start = State(h=torch.randn(2, 3, dtype=torch.float64), seen=torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(state_gradient_profile(mixer, x, direction=direction), wanted)
    torch.testing.assert_close(state_gradient_profile(mixer, x, start, direction=direction), wanted)
    assert not start["h"].requires_grad


def by_jacobians(mixer, x, direction, entries):
    """The same from one step's transposed Jacobian at a time, against the recorded states."""
    states = [mixer.init_state(x.shape[0], dtype=x.dtype)]
    for token in range(x.shape[1]):
        states.append(mixer(x[:, token : token + 1], states[-1])[1].detach())
    names = list(states[0])
    flows = tuple(torch.zeros_like(leaf) for leaf in states[-1].values())
    norms = []
    for token in reversed(range(x.shape[1])):
        last = token == x.shape[1] - 1

        def step(*leaves, token=token):
            y, after = mixer(x[:, token : token + 1], State(dict(zip(names, leaves, strict=True))))
            return (y[:, 0], *after.values())

        into_y = direction if last else torch.zeros_like(direction)
        flows = vjp(step, tuple(states[token].values()), (into_y, *flows))[1]
        chosen = [flow for name, flow in zip(names, flows, strict=True) if name in entries]
        norms.append(sum(flow.abs().square().flatten(1).sum(1) for flow in chosen).sqrt())
    return torch.stack(norms[::-1], 1).log10()


@pytest.mark.parametrize(
    ("name", "options", "entries"),
    [
        ("elman", {}, ["h"]),
        ("lstm", {"peephole": True}, ["h", "c"]),
        ("lstm", {"forget_bias": 3.0}, ["c"]),
        ("gru", {"num_heads": 2}, ["h"]),
        ("slstm", {"num_heads": 2, "conv_width": None}, ["h", "c", "n"]),
        ("gla", {"num_heads": 2}, ["memory"]),  # a matrix
        ("lru", {}, ["memory"]),  # complex
        ("mamba", {}, ["memory", "convolution"]),
    ],
)
def test_profile_is_the_product_of_jacobians(name, options, entries):
    mixer = mixers.build(name, dim=8, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    x, direction = torch.randn(2, 12, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    seen = state_gradient_profile(mixer, x, direction=direction, entries=entries)
    assert seen.shape == (2, 12)
    torch.testing.assert_close(seen, by_jacobians(mixer, x, direction, entries), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", mixers.names(streaming=True))
def test_every_mixer_has_a_profile(name):
    subject = Subject.registered(name)
    mixer, x = subject.build().double(), subject.input(2, 8).double()
    profile = state_gradient_profile(mixer, x)
    assert profile.shape == (2, 8)
    assert not profile.isnan().any()
    assert profile[:, -1].isfinite().all()  # every state says something about the next token


def test_float32_kernels_have_the_profile_of_float64_also_where_squares_would_underflow():
    torch.manual_seed(0)
    mixer = mixers.build("elman", dim=16)
    x, direction = torch.randn(2, 100, 16), torch.randn(2, 16)
    seen = state_gradient_profile(mixer, x, direction=direction)
    wanted = state_gradient_profile(mixer.double(), x.double(), direction=direction.double())
    assert wanted[:, 0].max() < -23  # squared, below what float32 can hold
    torch.testing.assert_close(seen, wanted, rtol=1e-3, atol=1e-3)


def test_what_cannot_reach_the_output_is_minus_infinity():
    profile = state_gradient_profile(Fading([0.0]), torch.randn(1, 4, 1, dtype=torch.float64))
    assert profile.tolist() == [[-math.inf] * 4]


def test_a_model_on_token_numbers():
    model = LanguageModel(11, 16, "gru,attention")
    ids = torch.randint(11, (2, 9))
    assert state_gradient_profile(model, ids, entries=["0/mixer"]).isfinite().all()
    assert state_gradient_profile(model, ids).shape == (2, 9)


def test_random_directions_follow_the_seed_and_nothing_is_left_behind():
    mixer, x = mixers.build("gru", dim=4), torch.randn(1, 5, 4)
    torch.manual_seed(3)
    first = state_gradient_profile(mixer, x)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(first, state_gradient_profile(mixer, x))
    assert all(parameter.grad is None for parameter in mixer.parameters())


def test_mistakes_are_named():
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match="module: Bidirectional cannot be read from left to right: "):
        state_gradient_profile(mixers.build("bidirectional", dim=8, mixer="gru"), x)
    with pytest.raises(ValueError, match=r"x: seen shape \(2, 0, 8\), wanted \(batch, time >= 1"):
        state_gradient_profile(mixers.build("gru", dim=8), x[:, :0])
    with pytest.raises(ValueError, match=r"entries: 'z' is not in the state of LSTM, which has \['h', 'c'\]"):
        state_gradient_profile(mixers.build("lstm", dim=8), x, entries=["h", "z"])
    with pytest.raises(ValueError, match=r"direction: seen shape \(8,\), wanted \(2, 8\) as y_T"):
        state_gradient_profile(mixers.build("gru", dim=8), x, direction=torch.ones(8))
    with pytest.raises(ValueError, match="module: Nothing keeps no state"):
        state_gradient_profile(Nothing(), x)


class Nothing(Mixer):
    """No memory at all."""

    def state_spec(self):
        return {}

    def init_state(self, batch_size, **options):
        return State()

    def forward(self, x, state=None, *, segments=None):
        return x, State()
