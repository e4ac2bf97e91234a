"""The compiled step is the module's own T = 1, for every mixer that keeps a state of fixed size."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from tidegate import LanguageModel, registry
from tidegate.infer import Unsupported, compile_step
from tidegate.infer import step as infer_step
from tidegate.nn.mixer import Mixer, grows
from tidegate.state import State

TOLERANCE = 2e-5  # of the largest number, as for every float32 kernel


FIXED = [
    name
    for name in registry.names(streaming=True)
    if not grows(registry.build(name, 32, **registry.info(name).tiny).state_spec())
]


def build(name, dim=32, **options):
    torch.manual_seed(0)
    mixer = registry.build(name, dim, **{**registry.info(name).tiny, **options})
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return mixer.eval()


def assert_near(found, wanted):
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    scale = wanted.abs().max().clamp(min=1.0).item() if wanted.numel() else 1.0
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE * scale)


def assert_same(found: State, wanted: State):
    assert list(found.tensors()) == list(wanted.tensors())
    for name, tensor in wanted.tensors().items():
        assert_near(found.tensors()[name], tensor)


OTHERS = [
    ("mamba", dict(negative_eigenvalues=True)),
    ("mamba2", dict(rule="zoh", skip_per_channel=True)),
    ("mamba2", dict(rule="trapezoid")),
    ("s4d", dict(rule="trapezoid", step_per_state=True)),
    *((name, dict(negative_eigenvalues=True)) for name in ("deltanet", "gated-deltanet", "kimi-delta-attention")),
    ("rwkv7", dict(negative_eigenvalues=True)),
    ("mlstm", dict(input_gate="sigmoid")),
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in FIXED), *OTHERS])
def test_equals_the_mixer(name, options, batch):
    mixer = build(name, **options)
    step = compile_step(mixer, batch)
    state = mixer.init_state(batch)
    with torch.no_grad():
        _, state = mixer(torch.randn(batch, 5, 32), state)
    ours = theirs = state
    for _ in range(4):
        x = torch.randn(batch, 1, 32)
        kept = ours.map(torch.clone)
        y, after = step(x, ours)
        with torch.no_grad():
            wanted, theirs = mixer(x, theirs)
        assert_near(y, wanted)
        assert_same(after, theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours.tensors().values(), kept.tensors().values(), strict=True))
        ours = after
    assert not y.requires_grad


def test_the_two_take_turns_and_states_fork():
    mixer = build("gla")
    step = compile_step(mixer)
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        whole, _ = mixer(x)
        _, state = mixer(x[:, :1])
    forked = state
    y, state = step(x[:, 1:2], state)
    assert_near(y, whole[:, 1:2])
    with torch.no_grad():
        assert_near(mixer(x[:, 2:], state)[0], whole[:, 2:])
    again, _ = step(x[:, 1:2], forked)
    assert torch.equal(again, y)


@pytest.mark.parametrize("layers", ["2*gla", "lru,rwkv7", "gated-deltanet,sliding-window-attention,lstm"])
@pytest.mark.parametrize("feed_forward", ["swiglu", "gelu", "channel-mix", "none"])
def test_a_language_model(layers, feed_forward):
    torch.manual_seed(1)
    model = LanguageModel(29, 64, layers, feed_forward=feed_forward).eval()
    step = compile_step(model, 2)
    ours = theirs = model.init_state(2)
    for _ in range(4):
        ids = torch.randint(29, (2, 1))
        logits, ours = step(ids, ours)
        with torch.no_grad():
            wanted, theirs = model(ids, theirs)
        assert_near(logits, wanted)
        assert_same(ours, theirs)


def test_dropout_is_off_and_the_module_keeps_its_mode():
    model = LanguageModel(11, 32, "lstm", dropout=0.5)
    step = compile_step(model)
    assert model.training
    state, ids = model.init_state(1), torch.tensor([[3]])
    with torch.no_grad():
        assert_near(step(ids, state)[0], model.eval()(ids, state)[0])


def test_changed_weights_are_seen():
    mixer, other = build("mamba2"), build("mamba2")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    step = compile_step(mixer)
    x, state = torch.randn(1, 1, 32), mixer.init_state(1)
    before = step(x, state)[0]
    mixer.load_state_dict(other.state_dict())
    wanted = other(x, state)[0].detach()
    assert_near(step(x, state)[0], wanted)
    assert not torch.allclose(before, wanted, atol=1e-3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.data = parameter.data / 1.5  # behind autograd's back, at another address
    step.refresh()
    assert_near(step(x, state)[0], before)


def test_a_replaced_parameter_is_seen():
    mixer = build("gru")
    step = compile_step(mixer)
    x, state = torch.randn(1, 1, 32), mixer.init_state(1)
    mixer.weight_ih = nn.Parameter(torch.zeros_like(mixer.weight_ih))
    with torch.no_grad():
        assert_near(step(x, state)[0], mixer(x, state)[0])


@pytest.mark.parametrize("way", ["strides", "submodule", "parametrized"])
def test_a_module_that_has_changed_is_followed(way):
    mixer = build("gla")
    step = compile_step(mixer)
    x, state = torch.randn(1, 1, 32), mixer.init_state(1)
    step(x, state)
    weight = torch.randn_like(mixer.o_proj.weight)
    if way == "strides":
        mixer.o_proj.weight = nn.Parameter(weight.t().contiguous().t())
    elif way == "submodule":
        mixer.o_proj = nn.Linear(32, 32, bias=False)
    else:
        torch.nn.utils.parametrizations.weight_norm(mixer.o_proj)
        with torch.no_grad():
            mixer.o_proj.parametrizations.weight.original0.mul_(3.0)
    with torch.no_grad():
        assert_near(step(x, state)[0], mixer(x, state)[0])


def test_a_module_that_no_longer_fits_is_refused():
    mixer = build("gla")
    x, state = torch.randn(1, 1, 32), mixer.init_state(1)
    step = compile_step(mixer)
    mixer.o_proj.weight = nn.Parameter(torch.zeros(3, 32))
    with pytest.raises(ValueError, match=r"shape \(32, 3\), but this step was compiled for \(32, 32\)"):
        step(x, state)
    for change in (lambda mixer: mixer.double(), lambda mixer: mixer.to("meta")):
        mixer = build("gla")
        step = compile_step(mixer)
        change(mixer)
        with pytest.raises(Unsupported, match="calculates in float32 on the CPU"):
            step(x, state)


def test_modes_of_the_parts_are_kept():
    model = LanguageModel(11, 32, "2*lstm")
    model.blocks[0].eval()
    modes = [part.training for part in model.modules()]
    compile_step(model)
    assert [part.training for part in model.modules()] == modes


def test_a_copy_is_a_step_of_the_copied_module():
    mixer = build("lru")
    step = copy.deepcopy(compile_step(mixer))
    x, state = torch.randn(1, 1, 32), mixer.init_state(1)
    with torch.no_grad():
        assert_near(step(x, state)[0], mixer(x, state)[0])
    assert step.module is not mixer


def test_compiling_under_autocast_and_another_default():
    mixer = build("gru")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu"):
            step = compile_step(mixer)
    finally:
        torch.set_default_dtype(torch.float32)
    x, state = torch.randn(1, 1, 32), mixer.init_state(1)
    with torch.no_grad():
        assert_near(step(x, state)[0], mixer(x, state)[0])


def test_a_model_made_for_inference_alone():
    with torch.inference_mode():
        mixer = build("rg-lru")
        step = compile_step(mixer)
        x, state = torch.randn(1, 1, 32), mixer.init_state(1)
        assert_near(step(x, state)[0], mixer(x, state)[0])


def test_results_do_not_depend_on_threads(monkeypatch):
    monkeypatch.setattr(infer_step, "_WORTHWHILE", 0)  # this model is small
    model = LanguageModel(64, 256, "2*gla").eval()
    step = compile_step(model)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 8, 1):
            torch.set_num_threads(threads)
            state = model.init_state(1)
            for token in range(20):
                logits, state = step(torch.tensor([[token]]), state)
            results.append((logits, *state.tensors().values()))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_calls_from_several_threads_take_turns():
    mixer = build("gated-deltanet")
    step = compile_step(mixer)
    inputs = torch.randn(4, 30, 1, 1, 32)

    def stream(own):
        state, outputs = mixer.init_state(1), []
        for x in own:
            y, state = step(x, state)
            outputs.append(y)
        return torch.cat(outputs)

    wanted = [stream(own) for own in inputs]
    found = [None] * 4

    def work(index):
        found[index] = stream(inputs[index])

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_strided_input_and_state():
    mixer = build("gla")
    step = compile_step(mixer, 2)
    x = torch.randn(2, 1, 64)[..., ::2]
    state = mixer.init_state(2).map(lambda t: t.add(1.0).transpose(-1, -2).contiguous().transpose(-1, -2))
    assert not any(t.is_contiguous() for t in (x, *state.tensors().values()))
    with torch.no_grad():
        assert_near(step(x, state)[0], mixer(x, state)[0])


class Picks(Mixer):
    """What a router needs: the largest entries of a token, and rows of a table by what is computed from it."""

    def __init__(self):
        super().__init__()
        self.dim, self.table = 5, nn.Parameter(torch.arange(15.0).view(5, 3))

    def state_spec(self):
        return {"values": (2,), "indices": ((2,), torch.int64), "some": (1,), "rows": (2, 3)}

    def forward(self, x, state=None, *, segments=None):
        values, indices = x[:, -1].topk(2)
        some = (x[:, -1] > 1).any(-1, keepdim=True).to(x.dtype)
        rows = self.table.index_select(0, indices.flatten()).unflatten(0, indices.shape)
        return x * self.table.sum(), State(values=values, indices=indices, some=some, rows=rows)


def test_the_largest_entries_and_rows_by_computed_indices():
    mixer = Picks()
    step, state = compile_step(mixer, 3), mixer.init_state(3)
    for x in (torch.randn(3, 1, 5), torch.tensor([[[-torch.inf, 3.0, -2.0, torch.inf, 0.5]]]).repeat(3, 1, 1)):
        with torch.no_grad():
            _, wanted = mixer(x, state)
        _, found = step(x, state)
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name
    _, found = step(torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0]).repeat(3, 1, 1), state)  # among equals, the first
    assert found["indices"].tolist() == [[1, 2]] * 3
    assert found["rows"][0].tolist() == [[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]
    assert not step(torch.zeros(3, 1, 5), state)[1]["some"].any()


def test_generation():
    torch.manual_seed(0)
    model = LanguageModel(31, 32, [("gla", {"num_heads": 2})])
    plain = model.generate([1, 2, 3], 20, temperature=0)
    compiled = model.generate([1, 2, 3], 20, temperature=0, compiled=True)
    assert torch.equal(compiled.all(), plain.all())
    assert_same(compiled.state, plain.state)
    rows = model.generate([[1, 2], [3, 4, 5]], 12, temperature=0, stop=7, compiled=True)
    assert torch.equal(rows.all(), model.generate([[1, 2], [3, 4, 5]], 12, temperature=0, stop=7).all())


class TestRefusals:
    def test_a_growing_state(self):
        with pytest.raises(Unsupported, match="grows with the sequence"):
            compile_step(registry.build("attention", 32, **registry.info("attention").tiny))

    def test_float64(self):
        with pytest.raises(Unsupported, match="calculates in float32"):
            compile_step(build("gla").double())

    def test_an_unknown_operator(self):
        class Sorted(Mixer):
            def __init__(self):
                super().__init__()
                self.dim, self.weight = 4, nn.Parameter(torch.ones(4))

            def state_spec(self):
                return {"x": (4,)}

            def forward(self, x, state=None, *, segments=None):
                return x.sort().values * self.weight, State(x=x[:, -1].clone())

        with pytest.raises(Unsupported, match="sort"):
            compile_step(Sorted())

    def test_batch_size(self):
        with pytest.raises(ValueError, match="batch_size: seen 0"):
            compile_step(build("gla"), 0)

    @pytest.mark.parametrize("token", [-1, 11, 2**40])
    def test_tokens_outside_the_vocabulary(self, token):
        model = LanguageModel(11, 32, "lstm")
        with pytest.raises(ValueError, match=f"x: seen token {token}, but the vocabulary has the tokens 0 to 10"):
            compile_step(model, 2)(torch.tensor([[3], [token]]), model.init_state(2))

    def test_other_shapes(self):
        mixer = build("gla")
        step = compile_step(mixer)
        state = mixer.init_state(1)
        with pytest.raises(ValueError, match=r"x: seen \(1, 2, 32\)"):
            step(torch.randn(1, 2, 32), state)
        with pytest.raises(ValueError, match=r"x: seen .* of torch.float64"):
            step(torch.randn(1, 1, 32).double(), state)
        with pytest.raises(ValueError, match=r"state: seen"):
            step(torch.randn(1, 1, 32), mixer.init_state(2))
        with pytest.raises(ValueError, match=r"state: seen .* on meta"):
            step(torch.randn(1, 1, 32), state.to("meta"))
        with pytest.raises(ValueError, match="belongs to another model"):
            step(torch.randn(1, 1, 32), State(a=torch.zeros(1)))
