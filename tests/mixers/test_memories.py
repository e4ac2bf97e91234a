"""Mixture of memories and gated associative memory: the papers' equations token by token, the layers they contain."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.contract.helpers import Subject, alone, assert_near, check_equal, pieces, results_of, segments_of, whole
from tests.contract.tolerances import EQUAL
from tidegate import LanguageModel, Segments, mixers, registry
from tidegate.nn.memory_rules import MEMORY_RULES
from tidegate.nn.routing import balance_loss, largest, usage, watch

D, T = 12, 17
HEADS = dict(num_heads=2, head_dim=4, expand_v=1.5)
MOM = [
    *(dict(inner=inner, num_memories=3, **HEADS) for inner in MEMORY_RULES),
    *(dict(inner=inner, num_memories=3, conv_width=None, **HEADS) for inner in ("gla", "hgrn2", "gated-deltanet")),
    *(dict(inner=inner, num_memories=3, single_kv_proj=True, **HEADS) for inner in ("gla", "mamba2")),
    dict(num_memories=5, top_k=1, renormalise=False, shared_memory=False, use_output_gate=False, **HEADS),
    dict(num_memories=2, top_k=2, conv_width=1, **HEADS),
]
GAM = [
    dict(num_slots=7),
    dict(num_slots=7, num_heads=3, separate_banks=True, temperature=None, dilation=3, gate="softmax"),
    dict(num_slots=7, num_heads=2, read_slots=2, temperature=0.5, learn_temperature=True, gate="none", conv_width=1),
    dict(num_slots=7, memory="dynamic"),
    dict(num_slots=7, memory="dynamic", num_heads=2, separate_banks=True, temperature=0.5),
    dict(branches="local", conv_width=4),
    dict(num_slots=5, branches="global", separate_banks=True),
    dict(num_slots=5, branches="global", memory="dynamic"),
]


def named(name, several):
    ids = ["-".join(f"{k}={v}" for k, v in options.items() if k not in HEADS) for options in several]
    return [pytest.param(name, options, id=f"{name}-{i}") for options, i in zip(several, ids, strict=True)]


def variants(*cases):
    return pytest.mark.parametrize(("name", "options"), [one for case in cases for one in case])


def build(name, options, dtype=torch.float64):
    return Subject(name, registry.info(name).cls, D, options).build(dtype)


# -- the contract, for the options that the tiny configurations leave out ----------------------------------------------
@variants(named("mom", MOM), named("gam", GAM))
@pytest.mark.parametrize("kind", ["whole", "packed_with_holes"])
def test_splits_documents_and_padding_change_nothing(name, options, kind):
    case = Subject(name, registry.info(name).cls, D, options)
    mixer, x = case.build(), case.input(3, T)
    state, segments = case.state(mixer, 3), segments_of(kind, 3, T, random.Random(str(options)))
    got, _ = check_equal(mixer, whole(mixer, segments), alone(mixer, segments), x, state)
    check_equal(mixer, pieces(mixer, (1, 2, 9), segments), alone(mixer, segments), x, state)
    if segments is not None:
        assert not got.outputs["y"][~segments.valid].any()
    single = case.build(torch.float32)
    wanted, seen = results_of((mixer, single), (whole(mixer, segments), whole(single, segments)), x, state)
    assert_near(seen.outputs, wanted.outputs, EQUAL[torch.float32], "outputs")


# -- mixture of memories: token by token -------------------------------------------------------------------------------
def written(rule, name, q, k, v, extra, memory, S):
    """(o, S) of one token and head-wise memory: S (H, K, V), q and k (H, K), v (H, V); the inner rules, written out."""
    H, K = q.shape
    outer = lambda k, v: k[:, :, None] * v[:, None, :]  # noqa: E731
    unit = lambda x: x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    if name in ("gated-deltanet", "mamba2"):
        step = functional.softplus(extra[:H] + rule.dt_bias)
        alpha = torch.exp(-rule.log_a.exp() * step)[:, None, None]
    if name == "linear":
        S = S + outer(k, v)
    elif name == "retnet":
        S = (1 - 2.0 ** (-5 - torch.arange(H)))[:, None, None] * S + outer(k, v)
    elif name == "gla":
        own = memory % rule.sets
        alpha = torch.sigmoid(extra @ rule.up[own] + rule.bias[own]).pow(1 / 16).view(H, K, 1)
        S = alpha * S + outer(k, v)
    elif name == "mamba2":
        S = alpha * S + outer(k, step[:, None] * v)
    elif name == "hgrn2":
        forget, q = torch.sigmoid(k), functional.silu(q)
        S = forget[:, :, None] * S + outer(1 - forget, v)
    elif name in ("deltanet", "gated-deltanet"):
        q, k, beta = unit(q), unit(k), torch.sigmoid(extra[-H:])[:, None, None]
        S = S * alpha if name == "gated-deltanet" else S
        S = S + beta * outer(k, v - torch.einsum("hk,hkv->hv", k, S))
    return torch.einsum("hk,hkv->hv", q, S) / math.sqrt(K), S


def token_by_token(mixer, x):
    """One row x (T, D): outputs, and the memories' states, from the paper's equations."""
    H, K, V, R = mixer.num_heads, mixer.key_dim, mixer.value_dim, mixer.memories
    states, windows, outputs = [torch.zeros(H, K, V).double()] * R, [[] for _ in range(R)], []
    sets = mixer.memory_proj.weight.split(sum(mixer.set_widths))
    for now in x:
        p = (mixer.router.weight @ now).softmax(-1)
        top = sorted(range(mixer.num_memories), key=lambda m: -p[m].item())[: mixer.top_k]
        share = p / sum(p[m] for m in top) if mixer.renormalise else p
        weight = {m: share[m] for m in top} | ({R - 1: 1.0} if mixer.shared_memory else {})
        total = torch.zeros(H, V).double()
        for m, w in weight.items():
            k, v, extra = (sets[m % len(sets)] @ now).split(mixer.set_widths)
            windows[m].append(torch.cat([mixer.q_proj.weight @ now, k, v]))
            qkv = windows[m][-1]
            if mixer.conv_width:
                recent = windows[m][-mixer.conv_width :]
                kernel = mixer.convolution.weight[:, -len(recent) :]
                qkv = sum(kernel[:, j] * u for j, u in enumerate(recent))
            if mixer.inner != "hgrn2" and (mixer.conv_width or mixer.rule.always_silu):
                qkv = functional.silu(qkv)
            q, k, v = (part.view(H, -1) for part in qkv.split(mixer.widths[:3]))
            o, states[m] = written(mixer.rule, mixer.inner, q, k, v, extra, m, states[m])
            total = total + w * o
        o = total / (total.square().mean(-1, keepdim=True) + mixer.norm_eps).sqrt() * mixer.norm.weight
        gate = 1 if mixer.output_gate is None else functional.silu(mixer.output_gate.weight @ now)
        outputs.append(mixer.o_proj.weight @ (o.flatten() * gate))
    return torch.stack(outputs), torch.stack(states)


@variants(named("mom", MOM))
def test_mom_equals_the_equations_token_by_token(name, options):
    mixer, x = build(name, options), torch.randn(2, T, D, dtype=torch.float64)
    with torch.no_grad():
        y, state = mixer(x)
        for row in range(2):
            outputs, states = token_by_token(mixer, x[row])
            torch.testing.assert_close(y[row], outputs, atol=1e-10, rtol=1e-10)
            torch.testing.assert_close(state["memory"][row], states, atol=1e-10, rtol=1e-10)


# -- one memory is the layer that is inside ----------------------------------------------------------------------------
INSIDE = {
    "linear": ("gla", dict(gate="none", expand_k=1.0)),
    "retnet": ("retnet", dict(rope_theta=None, expand_v=1.0)),
    "gla": ("gla", dict(expand_k=1.0, conv_width=4)),
    "hgrn2": ("hgrn2", dict(expand_ratio=D // 2, conv_width=4)),
    "deltanet": ("deltanet", dict(use_gate=True)),
    "gated-deltanet": ("gated-deltanet", dict(expand_k=1.0, expand_v=1.0)),
}


def copied(mixer, plain):
    """Give the plain layer the weights of the mixture's only memory."""
    k, v, extra = mixer.memory_proj.weight.split(mixer.set_widths)
    given = {"qkv_proj.weight": torch.cat([mixer.q_proj.weight, k, v]), "o_proj.weight": mixer.o_proj.weight}
    renamed = {"gate_proj": "output_gate", "output_gate": "output_gate", "norm": "norm", "convolution": "convolution"}
    for ours, theirs in renamed.items():
        if getattr(plain, ours, None) is not None and getattr(mixer, theirs) is not None:
            given[f"{ours}.weight"] = getattr(mixer, theirs).weight
    if mixer.inner == "gla":
        given |= {"gate_down.weight": extra, "gate_up.weight": mixer.rule.up[0].T}
        given["gate_bias_parameter"] = mixer.rule.bias[0]
    if mixer.inner == "deltanet":
        given["beta_proj.weight"] = extra
    if mixer.inner == "gated-deltanet":
        given["decay_proj.weight"], given["beta_proj.weight"] = extra.chunk(2)
        given |= {"log_a": mixer.rule.log_a, "dt_bias": mixer.rule.dt_bias}
    plain.load_state_dict({name: tensor.detach() for name, tensor in given.items()}, strict=True)


@pytest.mark.parametrize("inner", [name for name in INSIDE if name != "hgrn2"])
def test_a_mixture_of_one_memory_is_the_layer_inside(inner):
    name, options = INSIDE[inner]
    plain = mixers.build(name, D, num_heads=2, **options, dtype=torch.float64)
    one = dict(num_memories=1, top_k=1, shared_memory=False, conv_width=options.get("conv_width"))
    if "delta" in inner:
        one["conv_width"] = 4
    mixer = build("mom", dict(inner=inner, num_heads=2, **one))
    copied(mixer, plain)
    x, segments = torch.randn(2, T, D, dtype=torch.float64), Segments.packed([[5, 12], [17]])
    y, state = mixer(x, segments=segments)
    wanted, last = plain(x, segments=segments)
    torch.testing.assert_close(y, wanted, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state["memory"][:, 0], last["memory"], atol=1e-12, rtol=1e-12)


def test_the_rules_of_mamba2_and_hgrn2_are_those_of_their_layers():
    """Inside MoM they lack the direct path and the other norm: compared behind the recurrence."""
    torch.manual_seed(0)
    plain = mixers.build("mamba2", 8, state_dim=4, head_dim=8, use_norm=False, dtype=torch.float64)
    nn.init.zeros_(plain.d)
    nn.init.eye_(plain.o_proj.weight[:, :8])
    x, seen = torch.randn(2, T, 8, dtype=torch.float64), {}
    plain.convolution.register_forward_hook(lambda _, args, output: seen.update(xbc=output[0]))
    plain.in_proj.register_forward_hook(lambda _, args, output: seen.update(parts=output))
    plain.o_proj.register_forward_hook(lambda _, args, output: seen.update(o=args[0]))
    state = plain(x)[1]["memory"]
    rule = MEMORY_RULES["mamba2"](2, 4, dtype=torch.float64)
    rule.load_state_dict({"log_a": plain.log_a.detach(), "dt_bias": plain.dt_bias.detach()})
    u, b, c = seen["xbc"].split([16, 4, 4], -1)
    u, b, c = u.unflatten(-1, (2, 8)), b.unsqueeze(2).expand(-1, -1, 2, -1), c.unsqueeze(2).expand(-1, -1, 2, -1)
    z, dt = seen["parts"][..., :16], seen["parts"][..., 40:42]
    zeros = torch.zeros(2, 2, 4, 8, dtype=torch.float64)
    o, ours = rule(c, b, u, dt, zeros, None)
    torch.testing.assert_close(ours, state)
    torch.testing.assert_close(2 * o.flatten(-2) * functional.silu(z), seen["o"])  # its queries are not scaled

    plain = mixers.build("hgrn2", 8, expand_ratio=4, dtype=torch.float64)
    plain.o_proj.register_forward_hook(lambda _, args, output: seen.update(o=args[0]))
    state = plain(x)[1]["memory"]
    q, f, i = (part.unflatten(-1, (2, 4)) for part in plain.qkv_proj(x).chunk(3, -1))
    o, ours = MEMORY_RULES["hgrn2"](2, 4)(q, f, i, x[..., :0], torch.zeros(2, 2, 4, 4).double(), None)
    torch.testing.assert_close(ours, state)
    torch.testing.assert_close(plain.norm(o.flatten(-2)), seen["o"])


# -- mixture of memories: routes ---------------------------------------------------------------------------------------
def steered(**options):
    """A mixture whose memory m takes the tokens whose channel m is the largest."""
    mixer = mixers.build("mom", D, num_memories=3, top_k=1, **HEADS, **options, dtype=torch.float64)
    with torch.no_grad():
        mixer.router.weight.copy_(torch.eye(3, D))
    return mixer


def to(*memories):
    return 5 * functional.one_hot(torch.tensor([memories]), D).double()


def test_what_no_token_is_sent_to_stays_as_it_was():
    mixer = steered()
    _, state = mixer(torch.randn(1, T, D, dtype=torch.float64))
    _, after = mixer(to(1, 1, 1), state)
    for name, tensor in after.items():
        assert torch.equal(tensor[:, [0, 2]], state[name][:, [0, 2]])
        assert not torch.isclose(tensor[:, [1, 3]], state[name][:, [1, 3]]).all(-1).any()


def test_a_document_that_begins_elsewhere_empties_a_memory_too():
    mixer = steered()
    _, state = mixer(torch.randn(1, T, D, dtype=torch.float64))
    x = torch.cat([to(0, 1, 2), to(2)], 1)
    _, after = mixer(x, state, segments=Segments.packed([[3, 1]], continues=True))
    _, alone_after = mixer(to(2))
    for name, tensor in after.items():
        assert not tensor[:, :2].any()
        torch.testing.assert_close(tensor, alone_after[name])


def test_the_convolution_runs_along_the_memorys_own_tokens():
    """What stands between two tokens of a memory does not reach it, however near."""
    mixer = steered(shared_memory=False)
    first, later, between = (torch.rand(1, 1, D, dtype=torch.float64) for _ in range(3))
    first, later = first + to(0), later + to(0)
    near = torch.cat([first, later, later], 1)
    far = torch.cat([first, between + to(1), later, between + to(2), to(1), to(1), later], 1)
    for ours, theirs in ((1, 2), (2, 6)):
        torch.testing.assert_close(mixer(far)[0][:, theirs], mixer(near)[0][:, ours])


def test_weights_of_a_single_route_are_one_unless_left_as_they_are():
    x = torch.randn(2, T, D, dtype=torch.float64)
    for renormalise in (True, False):
        mixer = build("mom", dict(num_memories=3, top_k=1, renormalise=renormalise, **HEADS))
        mixer(x)[0].sum().backward()
        gradient = mixer.router.weight.grad
        assert bool(gradient is not None and gradient.abs().max() > 1e-9) is not renormalise


def test_initialisation_of_mom():
    mixer = mixers.build("mom", 64, num_heads=2, head_dim=16, inner="gla")
    bound = lambda out: 2**-2.5 * math.sqrt(6 / (64 + out))  # noqa: E731
    k, v, down = mixer.memory_proj.weight.split(mixer.set_widths * 5)[3:6]
    for weight in (mixer.router.weight, mixer.q_proj.weight, mixer.output_gate.weight, k, v, down):
        assert 0.95 * bound(len(weight)) < weight.abs().max() <= bound(len(weight))
    rule = mixers.build("mom", 512, num_heads=256).rule
    assert 0 < rule.log_a.exp().min() < 1
    assert 15 < rule.log_a.exp().max() <= 16
    step = functional.softplus(rule.dt_bias)
    assert 9e-4 < step.min() < 1.3e-3
    assert 0.08 < step.max() < 0.11


# -- routing -----------------------------------------------------------------------------------------------------------
def test_the_largest_are_exactly_k_also_among_equals():
    assert torch.equal(largest(torch.zeros(4, 5), 2).sum(-1), torch.full((4,), 2))
    logits = torch.randn(50, 7)
    kept = largest(logits, 3)
    assert (logits.masked_fill(~kept, 9).amin(-1) > logits.masked_fill(kept, -9).amax(-1)).all()


def test_the_balance_loss_is_the_papers_and_leaves_padding_out():
    mixer = build("mom", dict(num_memories=4, **HEADS))
    x, valid = torch.randn(3, T, D, dtype=torch.float64), torch.rand(3, T) < 0.6
    segments = Segments.padded(valid)
    x[~valid] = torch.nan
    p = (x[valid] @ mixer.router.weight.T).softmax(-1)
    choices = p.topk(2).indices
    f = torch.stack([(choices == m).double().mean(0) for m in range(4)])  # (M, choice)
    wanted = 4 * (f * p.mean(0)[:, None]).sum()
    torch.testing.assert_close(mixer.balance_loss(x, segments), wanted)
    torch.testing.assert_close(mixer.usage(x, segments).double(), f.sum(1) / 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixer.balance_loss(x[:1, valid[0]]), mixer.balance_loss(x[:1], segments[:1, :]))


def test_the_ends_of_the_balance_loss():
    even = torch.full((1, 6, 4), 0.25)
    routes = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]])[None]
    torch.testing.assert_close(balance_loss(even, routes), torch.tensor(2.0))
    same = torch.tensor([0.5, 0.5, 0, 0]).expand(1, 6, 4)
    torch.testing.assert_close(balance_loss(same, same > 0), torch.tensor(4.0))
    torch.testing.assert_close(usage(same > 0), torch.tensor([0.5, 0.5, 0.0, 0.0]))


def test_the_balance_loss_spreads_the_tokens():
    torch.manual_seed(0)
    mixer = mixers.build("mom", D, num_memories=4, **HEADS)
    with torch.no_grad():
        mixer.router.weight.mul_(0.1)[:2] += 0.2
    x = torch.randn(8, 64, D) + 1
    assert mixer.usage(x)[2:].sum() < 0.05
    optimiser = torch.optim.Adam([mixer.router.weight], lr=0.01)
    for _ in range(100):
        optimiser.zero_grad()
        mixer.balance_loss(x).backward()
        optimiser.step()
    assert mixer.usage(x).min() > 0.2
    assert mixer.balance_loss(x) < 2.01


def test_watching_a_model():
    model = LanguageModel(11, 16, [("mom", {"num_heads": 2}), "lstm", ("mom", {"num_heads": 2})])
    ids, segments = torch.randint(11, (2, 9)), Segments.padded(torch.rand(2, 9) < 0.7)
    seen = []
    for block in (model.blocks[0], model.blocks[2]):
        block.mixer.register_forward_hook(
            lambda part, args, kwargs, _: seen.append(part.balance_loss(args[0], kwargs["segments"])), with_kwargs=True
        )
    with watch(model) as loss:
        model(ids, segments=segments)
        found = loss()
        torch.testing.assert_close(found, (seen[0] + seen[1]) / 2)
        found.backward()
        assert model.blocks[0].mixer.router.weight.grad.any()
        with pytest.raises(ValueError, match="loss: no part with a router has run"):
            loss()
    model(ids)
    with pytest.raises(ValueError, match="loss: no part with a router has run"):
        loss()
    with pytest.raises(ValueError, match="model: none of its parts has a balance_loss"), watch(nn.Linear(2, 2)):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(inner="gsa"), "inner: seen 'gsa', wanted one of linear, retnet, gla"),
        (dict(top_k=5), "top_k: seen 5, wanted 1 to num_memories = 4"),
        (dict(top_k=0), "top_k: seen 0"),
        (dict(num_heads=5), "num_heads: 1 \\* dim / num_heads = 2.4"),
        (dict(head_dim=4, expand_v=1.3), "expand_v"),
    ],
)
def test_bad_options_of_mom(options, message):
    with pytest.raises(ValueError, match=message):
        mixers.build("mom", D, **options)


# -- gated associative memory ------------------------------------------------------------------------------------------
def gam_by_token(mixer, x):
    """One row x (T, D) from the equations; a dynamic memory as two sums over the past."""
    H, d = mixer.num_heads, mixer.head_dim
    outputs = []

    def slots(u, bank):
        logits = torch.stack([bank[:, h * d : (h + 1) * d] @ u[h * d : (h + 1) * d] for h in range(H)])
        warmth = mixer.start_temperature if mixer.log_temperature is None else mixer.log_temperature.exp()[:, None]
        logits = logits / warmth
        if mixer.read_slots is not None:
            least = logits.sort(-1).values[:, -mixer.read_slots, None]
            logits = torch.where(logits >= least, logits, -torch.inf)
        return logits.exp() / logits.exp().sum(-1, keepdim=True)

    for t, now in enumerate(x):
        local = found = torch.zeros(0)
        if mixer.convolution is not None:
            local = mixer.convolution.bias.clone()
            for j in range(mixer.conv_width):
                if t - j * mixer.dilation >= 0:
                    local = local + mixer.convolution.weight[:, -1 - j] * x[t - j * mixer.dilation]
        if mixer.bank is not None:
            read, other = slots(now, mixer.bank), mixer.bank if mixer.value_bank is None else mixer.value_bank
            if mixer.memory == "static":
                found = torch.cat([read[h] @ other[:, h * d : (h + 1) * d] for h in range(H)])
            else:
                alike = torch.stack([(read * slots(past, other)).sum(-1) for past in x[: t + 1]])  # (t + 1, H)
                values = x[: t + 1].unflatten(-1, (H, d))
                found = ((alike[..., None] * values).sum(0) / (alike.sum(0)[:, None] + 1e-6)).flatten()
        if not local.numel() or not found.numel():
            outputs.append(torch.cat([local, found]))
            continue
        if mixer.gate == "none":
            outputs.append(local + found)
            continue
        by_local, by_found = (mixer.gate_proj.weight @ now + mixer.gate_proj.bias).chunk(2)
        if mixer.gate == "softmax":
            total = by_local.exp() + by_found.exp()
            outputs.append((by_local.exp() * local + by_found.exp() * found) / total)
        else:
            outputs.append(torch.sigmoid(by_local) * local + torch.sigmoid(by_found) * found)
    return torch.stack(outputs)


@variants(named("gam", GAM))
def test_gam_equals_the_equations_token_by_token(name, options):
    mixer, x = build(name, options), torch.randn(2, T, D, dtype=torch.float64)
    with torch.no_grad():
        y, _ = mixer(x)
        for row in range(2):
            torch.testing.assert_close(y[row], gam_by_token(mixer, x[row]), atol=1e-10, rtol=1e-10)


def test_gam_is_a_convolution_and_an_attention_over_the_bank():
    mixer, x = build("gam", dict(num_slots=7, num_heads=3, dilation=2)), torch.randn(2, T, D, dtype=torch.float64)
    local = functional.conv1d(
        functional.pad(x.mT, (4, 0)), mixer.convolution.weight[:, None], mixer.convolution.bias, dilation=2, groups=D
    ).mT
    bank = mixer.bank.view(7, 3, 4).transpose(0, 1).expand(2, -1, -1, -1)
    heads = x.view(2, T, 3, 4).transpose(1, 2)
    found = functional.scaled_dot_product_attention(heads, bank, bank, scale=1.0).transpose(1, 2).flatten(-2)
    gates = torch.sigmoid(mixer.gate_proj(x))
    torch.testing.assert_close(mixer(x)[0], gates[..., :D] * local + gates[..., D:] * found)


def test_a_dynamic_memory_is_masked_attention_in_its_own_features():
    mixer = build("gam", dict(num_slots=7, memory="dynamic", branches="global"))
    x = torch.randn(2, T, D, dtype=torch.float64)
    phi = (x @ mixer.bank.T).softmax(-1)
    scores = (phi @ phi.mT).tril()
    wanted = scores @ x / (scores.sum(-1, keepdim=True) + 1e-6)
    y, state = mixer(x)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(state["memory"][:, 0], phi.mT @ functional.pad(x, (0, 1), value=1.0))


@pytest.mark.parametrize("memory", ["static", "dynamic"])
def test_how_far_gam_looks_back(memory):
    """L (W - 1) dilation tokens with the paper's bank, everything with a dynamic memory."""
    torch.manual_seed(0)
    layers = [
        mixers.build("gam", D, num_slots=5, dilation=dilation, memory=memory, dtype=torch.float64)
        for dilation in (1, 2, 4)
    ]
    x = torch.randn(1, 40, D, dtype=torch.float64, requires_grad=True)
    h = x
    for layer in layers:
        h = h + layer(h)[0]
    (gradient,) = torch.autograd.grad(h[0, -1].sum(), x)
    reached = gradient[0].abs().sum(-1) > 0
    far = 2 * (1 + 2 + 4)
    assert reached[-1 - far :].all()
    assert reached[: -1 - far].all() == reached[: -1 - far].any() == (memory == "dynamic")


def test_parameters_of_gam_are_the_papers():
    mixer = mixers.build("gam", 512, num_slots=512)
    feed_forward, norms = 8 * 512**2 + 5 * 512, 4 * 512
    assert sum(p.numel() for p in mixer.parameters()) + feed_forward + norms == 2_891_264
    bound = math.sqrt(6 / (512 + 512))
    assert 0.99 * bound < mixer.bank.abs().max() <= bound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(memory="hopfield"), "memory: seen 'hopfield', wanted one of static, dynamic"),
        (dict(gate="tanh"), "gate: seen 'tanh'"),
        (dict(branches="none"), "branches: seen 'none'"),
        (dict(num_slots=0), "num_slots: seen 0"),
        (dict(dilation=0), "dilation: seen 0"),
        (dict(temperature=0.0), "temperature: seen 0.0"),
        (dict(read_slots=513), "read_slots: seen 513, wanted 1 to num_slots = 512"),
        (dict(num_heads=5), "num_heads: 1 \\* dim / num_heads = 2.4"),
    ],
)
def test_bad_options_of_gam(options, message):
    with pytest.raises(ValueError, match=message):
        mixers.build("gam", D, **options)


@pytest.mark.parametrize("inner", MEMORY_RULES)
def test_an_empty_batch(inner):
    y, state = mixers.build("mom", 12, inner=inner, num_memories=3, **HEADS)(torch.zeros(0, 5, 12))
    assert y.shape == (0, 5, 12)
    assert len(state["memory"]) == 0
