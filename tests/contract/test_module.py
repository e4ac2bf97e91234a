"""The module around the recurrence: configuration, construction, copies, and errors that name the argument."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

from tests.contract.helpers import Subject
from tidegate import Segments, State, registry


def construct(subject: Subject, **arguments):
    return subject.cls(subject.dim, **{**subject.options, **arguments})


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# -- configuration -----------------------------------------------------------------------------------------------------
def test_the_configuration_rebuilds_the_module(subject: Subject):
    mixer = construct(subject)
    config = mixer.config()
    plain = json.loads(json.dumps(config))  # fails for anything but plain types
    for name, value in {"dim": subject.dim, **subject.options}.items():
        assert config[name] == value, name
    rebuilt = subject.cls(**plain)
    assert json.loads(json.dumps(rebuilt.config())) == plain
    rebuilt.load_state_dict(mixer.state_dict(), strict=True)
    x = subject.input(2, 9, torch.float32)
    assert torch.equal(rebuilt(x)[0], mixer(x)[0])
    assert repr(mixer).startswith(subject.cls.__name__)


def test_every_option_but_dim_has_a_default(subject: Subject):
    parameters = registry.Info(subject.name, subject.cls, "", "").options
    assert all(p.default is not p.empty and p.kind is p.KEYWORD_ONLY for p in parameters.values())
    assert {"device", "dtype"} <= set(registry.inspect.signature(subject.cls.__init__).parameters)


def test_a_misspelt_option_names_the_right_one(subject: Subject, monkeypatch):
    mixers = {name: registry.info(name) for name in registry.names()}
    mixers[subject.name] = registry.Info(subject.name, subject.cls, "", "", tiny=subject.options)
    monkeypatch.setattr(registry, "_mixers", mixers)
    for option in mixers[subject.name].options:
        with pytest.raises(ValueError, match=f"did you mean '{option}'"):
            registry.build(subject.name, subject.dim, **{option + "_": 1})


# -- construction ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_the_dtype_of_the_weights(subject: Subject, dtype: torch.dtype):
    mixer = construct(subject, dtype=dtype)
    assert {p.dtype for p in mixer.parameters()} == {dtype}
    assert all(p.isfinite().all() for p in mixer.parameters())


def test_construction_on_the_meta_device(subject: Subject):
    mixer = construct(subject, device="meta")
    assert {t.device.type for t in mixer.state_dict().values()} == {"meta"}
    assert {t.device.type for t in mixer.init_state(1).tensors().values()} <= {"meta"}
    x = torch.empty(2, 9, subject.dim, device="meta")
    y, state = mixer(x)
    assert y.shape == x.shape
    assert {t.device.type for t in (y, *state.tensors().values())} == {"meta"}


def test_reset_parameters_sets_everything_and_follows_the_seed(subject: Subject):
    torch.manual_seed(7)
    built = construct(subject)
    mixer = construct(subject)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(7)
    mixer.reset_parameters()
    left = [name for name, p in mixer.named_parameters() if not p.isfinite().all()]
    assert not left, f"reset_parameters leaves {', '.join(left)} as it was"
    kept = copy.deepcopy(mixer)
    torch.manual_seed(7)
    mixer.reset_parameters()
    assert same_weights(mixer, kept), "another result from the same seed"
    torch.manual_seed(7)
    assert same_weights(construct(subject), built), "another module from the same seed"
    # The constructor may draw in another order; what is one number everywhere is to be the same number.
    fixed = [{n: p.unique().item() for n, p in m.named_parameters() if p.unique().numel() == 1} for m in (built, mixer)]
    assert fixed[0] == fixed[1], "the constructor sets something else than reset_parameters"


def test_a_module_on_the_meta_device_becomes_real(subject: Subject):
    """How large models are made: shapes first, memory later, numbers from reset_parameters."""
    mixer = construct(subject, device="meta").to_empty(device="cpu")
    mixer.reset_parameters()
    with torch.no_grad():
        y, _ = mixer(subject.input(2, 9, torch.float32))
    assert y.isfinite().all()


def test_no_weight_decay_names_parameters(subject: Subject):
    mixer = construct(subject)
    direct = {name for name, _ in mixer.named_parameters(recurse=False)}
    if "layer_index" in mixer.config():  # some parameters exist in every layer but the first
        direct |= {name for name, _ in construct(subject, layer_index=1, num_layers=2).named_parameters(recurse=False)}
    assert isinstance(mixer.no_weight_decay, tuple)
    unknown = set(mixer.no_weight_decay) - direct
    assert not unknown, f"no_weight_decay: {sorted(unknown)} are no parameters of this module; it has {sorted(direct)}"


def test_copies_pickles_and_state_dicts(subject: Subject):
    mixer = subject.build(torch.float32)
    x = subject.input(2, 9, torch.float32)
    y = mixer(x)[0]
    loaded = construct(subject)
    loaded.load_state_dict(mixer.state_dict(), strict=True)
    for twin in (copy.deepcopy(mixer), pickle.loads(pickle.dumps(mixer)), loaded):
        assert same_weights(twin, mixer)
        assert torch.equal(twin(x)[0], y)


def test_every_weight_matters(subject: Subject):
    """Each parameter receives a gradient from the outputs or the final state: nothing is dead."""
    mixer = subject.build()
    y, state = mixer(subject.input(2, 33), subject.state(mixer, 2))
    loss = y.square().sum() + sum(t.square().sum() for t in state.tensors().values() if t.is_floating_point())
    loss.backward()
    dead = [name for name, p in mixer.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead, f"without effect: {', '.join(dead)}"


def test_an_empty_batch(subject: Subject):
    mixer = subject.build(torch.float32)
    x = subject.input(1, 133, torch.float32)[:0].requires_grad_()
    y, state = mixer(x)
    assert y.shape == x.shape
    assert all(len(leaf) == 0 for leaf in state.tensors().values())
    y.sum().backward()
    assert x.grad is not None


# -- errors ------------------------------------------------------------------------------------------------------------
def test_errors_name_the_argument(subject: Subject):
    mixer = subject.build(torch.float32)
    x, state = subject.input(2, 5, torch.float32), subject.state(mixer, 2, torch.float32)
    other = Segments.packed([[4], [4]])
    cases = [
        ("x", (x[:, :0],), {}),
        ("x", (x[..., :-1],), {}),
        ("x", (x[0],), {}),
        ("x", (x[None],), {}),
        ("state", (x, State(something_else=x)), {}),
        ("state", (x, State({**state, "more": x})), {}),
        ("state", (x, tuple(state.values())), {}),
        ("segments", (x,), {"segments": other}),
        ("segments", (x, state), {"segments": Segments.packed([[5]])}),
        ("segments", (x,), {"segments": torch.ones(2, 5, dtype=torch.bool)}),
    ]
    if first := next(iter(state), None):  # else the state is empty, and the same for every batch
        cases += [
            ("state", (x, subject.state(mixer, 3, torch.float32)), {}),
            ("state", (x, State()), {}),
            ("state", (x, State({**state, first: State()})), {}),
            ("state", (x, State({**state, first: state.tensors()[next(iter(state.tensors()))][..., None]})), {}),
        ]
    for name, arguments, options in cases:
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            mixer(*arguments, **options)
