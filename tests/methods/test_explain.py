"""What explain says of a mixer is the mixer: matrices and recurrences give its output; or it says why it cannot."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.contract.helpers import Subject
from tidegate import LanguageModel, Segments, mixers, ops, registry
from tidegate.methods.explain import explain, rebuild
from tidegate.methods.explain.members import MEMBERS
from tidegate.methods.explain.picture import View, picture
from tidegate.ops.calls import answered_by

EXACT = 1e-8  # of the largest output, in float64

# Every mixer is explained but these. What is refused without standing here fails, and so does what stands here and is
# not refused.
REFUSED = {
    name: "the update of this cell is not linear in its state"
    for name in mixers.names()
    if registry.info(name).family == "cell"
} | {
    "sru": "the gates of this SRU see its state",
    "gam": "GatedAssociativeMemory: none of attention, .* has run",  # a bank that is the same for every sequence
    "fsmn": "FSMN: none of attention, .* has run",  # a short filter, not a recurrence
}
# Presets with a recurrence, a decay or a normaliser that the tiny variant does not have.
PRESETS = (
    "deltaproduct/gated",
    "gam/dynamic",
    "gated-attention-unit/laplace",
    "gated-attention-unit/softmax",
    "gla/no-gate",
    "gla/retention-gate",
    "gla/scalar-gate",
    "gss/real",
    "hgrn/paper",
    "kimi-delta-attention/bounded",
    "lightnet/scalar",
    "linear-attention/based",
    "linear-attention/norm-attention",
    "linear-attention/unnormalised",
    "liquid-s4/exact",
    "mlstm-pre-up/sigmoid",
    "mlstm/sigmoid",
    "mom/gla",
    "mom/linear",
    "qlstm/plain",
    "s4/lra-pathfinder",
    "seqboat/always-active",
    "sru/v1",
    "transnormer/lightning",
)
LINEAR = [name for name in mixers.names() if name not in REFUSED]


def built(name, **options):
    """The mixer as the contract suite tests it, with a preset behind a slash, and an input of 2 x 10 (s4nd: 8)."""
    name, _, preset = name.partition("/")
    subject = Subject.registered(name)
    given = {**subject.options, **(registry.info(name).presets[preset] if preset else {}), **options}
    subject = dataclasses.replace(subject, options=given)
    return subject.build(), subject.input(2, 8 if name == "s4nd" else 10)


def documents(x):
    """Two documents in the first row, with padding in between; the second row is one document."""
    time = x.shape[1]
    if time == 8:  # s4nd, whose documents are whole grids or begin with one
        return Segments.packed([[3, 5], [8]])
    real = torch.ones(2, time, dtype=torch.bool)
    real[0, 3] = real[1, -1] = False
    return Segments.packed([[5, time - 5], [time]]) & Segments.padded(real)


def by_loop(system):
    """o (B, T, H, V) from the public matrices alone: the equation in System's docstring, a token at a time."""
    A, B, C, v = system.transition, system.input, system.readout, system.values
    starts, valid = documents_of(system)
    o = torch.zeros(*C.shape[:3], v.shape[-1], dtype=torch.complex128)
    for row in range(C.shape[0]):
        S = torch.zeros(C.shape[2], C.shape[3], v.shape[-1], dtype=torch.complex128)
        for t in range(C.shape[1]):
            if starts[row, t]:
                S = torch.zeros_like(S)
            if not valid[row, t]:
                continue
            matrix = A[row, t] if A.ndim == 5 else torch.diag_embed(A[row, t].expand(C.shape[2:]))
            before, S = S, matrix.to(S.dtype) @ S + (B[row, t].to(S.dtype) @ v[row, t].to(S.dtype))
            read = before if system.reads_before else S
            o[row, t] = torch.einsum("hn,hnv->hv", C[row, t].to(S.dtype), read)
            if system.skip is not None:
                o[row, t] += torch.einsum("hm,hmv->hv", system.skip[row, t].to(S.dtype), v[row, t].to(S.dtype))
            if system.beside is not None:
                o[row, t] += system.beside[row, t]
    return as_output(o, system)


def documents_of(system):
    if system.segments is None:
        first = torch.arange(system.readout.shape[1]) == 0
        return first.expand(system.readout.shape[:2]), torch.ones(system.readout.shape[:2], dtype=torch.bool)
    return system.segments.starts, system.segments.valid


def by_matrix(system):
    """attention @ values (+ beside)."""
    v = system.values.to(torch.complex128)
    o = torch.einsum("bhts,bshv->bthv", system.attention.to(v.dtype), steps_as_tokens(v))
    if system.beside is not None:
        o = o + torch.where(documents_of(system)[1][..., None, None], system.beside, 0)
    return as_output(o, system)


def steps_as_tokens(v):
    return v.transpose(2, 3).flatten(1, 2)


def as_output(o, system):
    o = o.flip(1) if system.backwards else o
    return (o if system.output.is_complex() else o.real).reshape(system.output.shape)


def assert_exact(got, wanted, what):
    size = wanted.abs().max().item()
    assert size > 0, f"{what}: nothing to compare"
    error = (got - wanted).abs().max().item() / size
    assert error < EXACT, f"{what}: error {error:.1e} of the largest"


# -- every mixer -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("name", [*LINEAR, *PRESETS])
def test_matrix_and_recurrence_are_the_mixer(name, packed):
    mixer, x = built(name)
    segments = documents(x) if packed else None
    y, _ = mixer(x, segments=segments)
    seen = explain(mixer, x, segments=segments)
    assert torch.equal(seen.output, y)
    assert not seen.refused
    for number, system in enumerate(seen.systems):
        assert_exact(system.rebuilt(), system.output, f"rebuilt, {number}: {system.op}")
        assert_exact(system.recurrent(), system.output, f"recurrent, {number}: {system.op}")
        assert_exact(by_matrix(system), system.output, f"attention @ values, {number}: {system.op}")
        assert_exact(by_loop(system), system.output, f"transition, input, readout, {number}: {system.op}")
    assert_exact(rebuild(mixer, x, segments=segments), y, "the mixer from its matrices")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_with_a_reason(name):
    mixer, x = built(name)
    for look in (explain, rebuild):
        with pytest.raises(ValueError, match=REFUSED[name]):
            look(mixer, x)


class Op(torch.nn.Module):
    """A call of an op as a module, all arguments in float64."""

    def __init__(self, name):
        super().__init__()
        self.op = getattr(ops, name)

    def forward(self, *args, **options):
        return self.op(*args, **options)[0]


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


# What no mixer's tiny variant or preset above asks of its op.
OPTIONS = {
    "attention, windows with a bias": lambda: (
        "attention",
        (draw(2, 9, 4, 3), draw(2, 9, 2, 3), draw(2, 9, 2, 5)),
        {"window": 4, "kernel": "relu2", "bias": draw(4, 4), "scale": 0.7},
    ),
    "attention, a softmax with a bias": lambda: (
        "attention",
        (draw(2, 9, 2, 3), draw(2, 9, 2, 3), draw(2, 9, 2, 5)),
        {"window": 3, "bias": draw(2, 3)},
    ),
    "delta_rule, steps and a decay per channel": lambda: (
        "delta_rule",
        (draw(2, 9, 2, 3), draw(2, 9, 3, 2, 3) / 2, draw(2, 9, 3, 2, 4), draw(2, 9, 3, 2).sigmoid()),
        {"log_decay": -draw(2, 9, 2, 3).exp(), "scale": 0.5},
    ),
    "dplr": lambda: (
        "dplr",
        (draw(2, 9, 2, 3), draw(2, 9, 2, 3) / 3, draw(2, 9, 2, 4), draw(2, 9, 2, 3) / 3, draw(2, 9, 2, 3) / 2),
        {"log_decay": -draw(2, 9, 2, 3).exp()},
    ),
    "linear_attention, one decay per head": lambda: (
        "linear_attention",
        (draw(2, 9, 2, 3), draw(2, 9, 2, 3), draw(2, 9, 2, 4)),
        {"log_decay": -draw(2).exp(), "scale": 0.5, "read_before_write": True, "bonus": draw(2, 3)},
    ),
    "scan, complex and from the right": lambda: (
        "scan",
        (torch.polar(draw(5).sigmoid(), draw(5)), torch.complex(draw(2, 9, 5), draw(2, 9, 6)[..., 1:])),
        {"reverse": True},
    ),
    "selective_scan, negative eigenvalues": lambda: (
        "selective_scan",
        (draw(2, 9, 3), draw(2, 9, 4)[..., 1:].exp(), -draw(3, 2).exp(), draw(2, 9, 2), draw(2, 9, 2) + 1),
        {"d": draw(3), "dt_bias": draw(3), "z": draw(2, 9, 3), "negative_eigenvalues": True},
    ),
}


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_ops(case, packed):
    name, args, options = OPTIONS[case]()
    if packed:
        options = options | {"segments": documents(torch.empty(2, 9))}
    (system,) = explain(Op(name), *args, **options).systems
    for form in (system.rebuilt(), system.recurrent(), by_matrix(system), by_loop(system)):
        assert_exact(form, system.output, case)


@pytest.mark.parametrize("name", LINEAR)
def test_the_mixer_depends_on_what_the_matrices_give(name):
    """Else the comparison above would say nothing of the whole mixer."""
    mixer, x = built(name)
    y, _ = mixer(x)
    silent = []

    def nothing(call):
        o, *rest = call.run()
        silent.append(call.op)
        return torch.zeros_like(o), *rest

    with answered_by(nothing):
        other, _ = mixer(x)
    assert set(silent) <= set(MEMBERS)
    assert (other - y).abs().max() > 1e-6 * y.abs().max()


def test_every_recurrence_of_ops_has_a_member_or_a_reason():
    """An op that is decorated and forgotten would be refused in every mixer that calls it."""
    decorated = {name for name in ops.__all__ if hasattr(getattr(ops, name), "__wrapped__")}
    assert decorated == set(MEMBERS)


# -- the attention matrix ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name", ["attention", "gla", "deltaproduct", "rwkv6", "s5", "mlstm", "sliding-window-attention"]
)
def test_documents_do_not_mix_and_nothing_sees_the_future(name):
    mixer, x = built(name)
    segments = documents(x)
    document, valid = segments.documents[0], segments.valid[0]
    apart = (document[:, None] != document) | ~valid[:, None] | ~valid
    for system in explain(mixer, x, segments=segments).systems:
        attention = system.attention[0]
        attention = attention.unflatten(-1, (10, -1)).abs().sum(-1)
        assert attention[:, apart].abs().max() == 0
        assert attention.triu(1).abs().max() == 0
        assert attention[:, 4, 2].abs().max() > 0, "over the padding, within the document"


def test_a_softmax_matrix_is_the_softmax():
    mixer, x = built("attention", rope_theta=None)
    (system,) = explain(mixer, x).systems
    q, k, v = mixer.qkv_proj(x).split(mixer.widths, -1)
    q, k = q.unflatten(-1, (4, -1)), k.unflatten(-1, (2, -1)).repeat_interleave(2, 2)
    scores = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    wanted = scores.masked_fill(torch.ones(10, 10, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    torch.testing.assert_close(system.attention, wanted.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(system.values[:, :, ::2, 0], v.unflatten(-1, (2, -1)), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(system.normaliser, scores.exp().tril().sum(-1).transpose(1, 2), rtol=1e-9, atol=0)


def test_the_normaliser_stands_in_the_transition():
    """Lambda_t = eta_(t-1) / eta_t and B_t = psi(k_t) / eta_t, while the read-out is phi(q_t) alone (the paper's a)."""
    mixer, x = built("linear-attention")
    (system,) = explain(mixer, x).systems
    q, k = (f(part.unflatten(-1, (2, -1))) for f, part in zip(
        (mixer.q_map, mixer.k_map), mixer.qkv_proj(x).split(mixer.widths, -1)[:2], strict=True
    ))  # fmt: skip
    eta = torch.einsum("bthk,bthk->bth", q, k.cumsum(1)) + mixer.eps
    torch.testing.assert_close(system.normaliser, eta.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(system.transition[:, 1:, :, 0], (eta[:, :-1] / eta[:, 1:]).detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(system.input[..., 0], (k / eta[..., None]).detach(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(system.readout, q.detach(), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(system.attention.sum(-1), torch.ones(2, 2, 10).double(), rtol=1e-5, atol=0)


def test_a_bidirectional_mixer_has_a_system_for_each_direction():
    mixer, x = built("bidirectional")
    forth, back = explain(mixer, x).systems
    assert (forth.op, back.op) == ("linear_attention", "linear_attention")
    assert forth.layer != back.layer


def test_a_scan_from_the_right_is_told_as_such():
    class Backwards(torch.nn.Module):
        def forward(self, x, segments=None):
            return ops.scan(torch.tensor([0.5]).double(), x, reverse=True, segments=segments)[0]

    x = torch.arange(1.0, 7.0).double().view(1, 6, 1)
    (system,) = explain(Backwards(), x).systems
    assert system.backwards
    torch.testing.assert_close(system.values.flatten(), x.flatten().flip(0))
    torch.testing.assert_close(system.attention[0, 0, 3], torch.tensor([0.125, 0.25, 0.5, 1, 0, 0]).double())
    packed = Segments.packed([[2, 4]])
    (system,) = explain(Backwards(), x, segments=packed).systems
    for form in (system.rebuilt(), system.recurrent(), by_matrix(system), by_loop(system)):
        torch.testing.assert_close(form, system.output)
    assert system.attention[0, 0, 4:, :4].abs().max() == 0


def test_selected_heads_are_those_heads():
    for name in ("retnet", "s4d", "attention", "mlstm"):
        mixer, x = built(name)
        (system,) = explain(mixer, x).systems
        part = system.select([1])
        torch.testing.assert_close(part.attention, system.attention[:, [1]])
        torch.testing.assert_close(part.eigenvalues, system.eigenvalues[:, :, [1]])
        torch.testing.assert_close(part.memory_length, system.memory_length[:, [1]])


def test_float32_is_explained_in_float64():
    mixer, x = built("gla")
    mixer, x = mixer.float(), x.float()
    (system,) = explain(mixer, x).systems
    assert system.attention.dtype == torch.float64
    assert system.rebuilt().dtype == torch.float32
    torch.testing.assert_close(rebuild(mixer, x), mixer(x)[0], rtol=1e-4, atol=1e-5)


def test_a_model_has_the_systems_of_its_layers():
    torch.manual_seed(0)
    layers = [("gla", {"num_heads": 2}), ("lstm", {}), ("attention", {"num_heads": 2})]
    model = LanguageModel(20, 16, layers).double()  # kernels of float32 take seconds to compile
    seen = explain(model, torch.randint(20, (1, 6)))
    assert [(system.layer, system.op) for system in seen.systems] == [
        ("blocks.0.mixer", "linear_attention"),
        ("blocks.2.mixer", "attention"),
    ]
    assert seen.output.shape == (1, 6, 20)
    assert list(seen.refused) == ["blocks.1.mixer"]
    half = LanguageModel(20, 16, [("gla", {"num_heads": 2}), ("sru", {})]).double()
    seen = explain(half, torch.randint(20, (1, 6)))
    assert "gates_see_state=False" in seen.refused["blocks.1.mixer"]


# -- eigenvalues and memory --------------------------------------------------------------------------------------------
def test_eigenvalues_of_retnet_are_its_constants():
    mixer, x = built("retnet")
    (system,) = explain(mixer, x).systems
    wanted = 1 - 2.0 ** (-5 - torch.arange(2.0).double())
    assert system.eigenvalues.imag.abs().max() == 0
    torch.testing.assert_close(system.eigenvalues.real, wanted[:, None].expand(2, 10, 2, 1), rtol=1e-6, atol=0)


def test_eigenvalues_of_s4d_are_those_of_its_discretised_system():
    mixer, x = built("s4d")
    (system,) = explain(mixer, x).systems
    a = torch.complex(-mixer.log_real.exp(), mixer.imag)
    wanted = torch.exp(mixer.log_step.exp()[:, None] * a).detach()
    torch.testing.assert_close(system.eigenvalues, wanted.expand_as(system.eigenvalues), rtol=1e-9, atol=1e-12)
    assert system.eigenvalues.abs().max() < 1


def test_eigenvalues_of_a_delta_rule_may_be_negative():
    for negative, low in ((False, 0.0), (True, -1.0)):
        mixer, x = built("deltanet", negative_eigenvalues=negative)
        (system,) = explain(mixer, 3 * x).systems
        values = system.eigenvalues
        assert values.imag.abs().max() < 1e-9
        assert low - 1e-9 <= values.real.min() < low + 0.5
        assert values.real.max() <= 1 + 1e-9
        # I - beta k k^T with a unit key: 1, but once 1 - beta
        torch.testing.assert_close(values.real.sort().values[..., 1:], torch.ones_like(values.real[..., 1:]))


def test_eigenvalues_of_several_reflections_stay_in_the_unit_circle():
    mixer, x = built("deltaproduct", negative_eigenvalues=True, forget_gate=False, num_steps=2)
    (system,) = explain(mixer, 3 * x).systems
    assert system.eigenvalues.abs().max() <= 1 + 1e-9
    assert system.eigenvalues.real.min() < 0
    assert system.attention.shape[-1] == 2 * 10


class Fading(torch.nn.Module):
    """h_t = a h_(t-1) + x_t."""

    def __init__(self, *a):
        super().__init__()
        self.a = torch.tensor(a).double()

    def forward(self, x, segments=None):
        return ops.scan(self.a, x, segments=segments)[0]


def test_memory_of_a_constant_decay_in_closed_form():
    a, time = torch.tensor([0.5, 0.9]).double(), 300
    (system,) = explain(Fading(0.5, 0.9), torch.ones(1, time, 2).double()).systems
    torch.testing.assert_close(system.decay_profile[0], a[:, None] ** torch.arange(time), rtol=1e-9, atol=1e-30)
    torch.testing.assert_close(system.memory_length[0], a / (1 - a), rtol=1e-6, atol=0)
    torch.testing.assert_close(system.time_constant[0], -1 / a.log(), rtol=1e-12, atol=0)
    torch.testing.assert_close(system.eigenvalues.real[0, :, :, 0], a.expand(time, 2), rtol=1e-12, atol=0)


def test_memory_at_its_ends():
    (system,) = explain(Fading(1.0, 0.0, -1.0), torch.ones(1, 21, 3).double()).systems
    assert system.memory_length[0].tolist() == [10.0, 0.0, 10.0]  # a plain sum: (T - 1) / 2
    assert system.time_constant[0].tolist() == [math.inf, 0.0, math.inf]
    (system,) = explain(Fading(0.5), torch.ones(1, 1, 1).double()).systems
    assert system.memory_length.item() == 0


def test_the_profile_counts_pairs_of_the_same_document():
    x = torch.ones(1, 9, 1).double()
    (system,) = explain(Fading(0.5), x, segments=Segments.packed([[4, 5]])).systems
    torch.testing.assert_close(
        system.decay_profile[0, 0], torch.tensor([1, 0.5, 0.25, 0.125, 0.0625, 0, 0, 0, 0]).double()
    )
    (system,) = explain(Fading(0.5), x, segments=Segments.padded(torch.zeros(1, 9))).systems
    assert system.memory_length.isnan().all()


# -- the picture -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["s4d", "deltaproduct", "hyena"])
def test_a_picture_of_any_system(name):
    """Complex and real eigenvalues, several steps per token, padding, a single token; more is seen in tests/cli."""
    mixer, x = built(name)
    runs = [explain(mixer, x[:, :1]), explain(mixer, x, segments=documents(x))]
    views = [View.of(run.systems[0]) for run in runs]
    png = picture(views, ["one token", "padded"], ["a"])
    assert png.startswith(b"\x89PNG")
    assert png.endswith(b"IEND\xaeB`\x82")


def test_a_view_of_many_heads_is_of_some_evenly_spaced():
    (system,) = explain(Fading(*torch.linspace(0, 1, 200).tolist()), torch.ones(1, 4, 200).double()).systems
    view = View.of(system)
    assert (view.count, len(view.heads), view.heads[0], view.heads[-1]) == (200, 64, 0, 199)
    assert view.system.attention.shape[1] == 64
    torch.testing.assert_close(view.system.eigenvalues, system.eigenvalues[:, :, view.heads])


# -- errors ------------------------------------------------------------------------------------------------------------
def test_a_run_that_begins_with_a_state_is_refused():
    for name in ("gla", "attention", "s4d", "mlstm"):
        mixer, x = built(name)
        _, state = mixer(x)
        with pytest.raises(ValueError, match="begins with a state that is not empty"):
            explain(mixer, x, state)
        explain(mixer, x, mixer.init_state(2))  # empty is a beginning


def test_a_matrix_that_does_not_fit_says_what_to_do():
    (system,) = explain(Fading(0.5), torch.ones(1, 12_000, 1).double()).systems
    with pytest.raises(ValueError, match=r"attention: 1 x 1 heads x 12000\^2 tokens make .* give fewer tokens"):
        _ = system.attention


def test_a_module_without_mixer_is_refused_by_name():
    with pytest.raises(ValueError, match=r"Linear: none of attention, .* has run"):
        explain(torch.nn.Linear(3, 3), torch.ones(1, 2, 3))


def test_listening_ends_with_an_error():
    mixer, _ = built("gla")
    with pytest.raises(ValueError, match="x: "):
        explain(mixer, torch.ones(1, 2, 5).double())
    assert explain(mixer, torch.ones(1, 2, 32).double()).systems
    assert not mixer._forward_pre_hooks
