"""The registry: names to classes, and errors that name the closest valid choice."""

import importlib
import pkgutil
import threading

import pytest
from torch import nn

from tidegate import mixers, registry
from tidegate.registry import PROPERTIES, Info, build, check_options, did_you_mean, info, names, register


class Toy(nn.Module):
    def __init__(self, dim, *, num_heads=2, gate="swish", device=None, dtype=None):
        super().__init__()
        self.dim, self.num_heads, self.gate = dim, num_heads, gate


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """What a test registers is gone after it; what the library registers is there."""
    monkeypatch.setattr(registry, "_mixers", {name: info(name) for name in names()})


@pytest.fixture
def toy():
    presets = {"large": {"num_heads": 8}}
    return register("toy", family="cell", paper="toys", tiny={"num_heads": 1}, presets=presets)(Toy)


def test_a_registered_mixer_is_known_by_name(toy):
    assert toy is Toy
    assert "toy" in names()
    assert names() == sorted(names())
    known = info("toy")
    assert isinstance(known, Info)
    assert (known.cls, known.family, known.paper, known.tiny) == (Toy, "cell", "toys", {"num_heads": 1})
    assert list(known.options) == ["num_heads", "gate"]


def test_build_passes_options_and_presets(toy):
    assert build("toy", 8, num_heads=4).num_heads == 4
    assert build("toy", dim=8).dim == 8
    large = build("toy", 8, preset="large", gate="silu")
    assert (large.num_heads, large.gate) == (8, "silu")
    assert build("toy", 8, preset="large", num_heads=3).num_heads == 3
    assert build("toy", 8, preset=None).num_heads == 2
    assert info("toy").presets == {"large": {"num_heads": 8}}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tooy", {}, "mixer: there is no 'tooy', did you mean 'toy'"),
        ("toy", {"num_head": 1}, "toy: no option 'num_head', did you mean 'num_heads'.*it takes num_heads, gate"),
        ("toy", {"xyz": 1}, "toy: no option 'xyz'; it takes"),
        ("toy", {"preset": "lage"}, "toy: no preset 'lage', did you mean 'large'.; it has large"),
    ],
)
def test_errors_name_the_closest_choice(toy, name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, 8, **options)


def test_options_are_checked_without_building(toy):
    check_options("toy", ["num_heads", "device", "dtype"])
    check_options("toy", {"preset": "large"})
    with pytest.raises(ValueError, match="no option 'heads'"):
        check_options("toy", ["heads"])


def test_a_name_belongs_to_one_class(toy):
    class Other(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"name: 'toy' is already registered by .*Toy"):
        register("toy", family="cell", paper="x")(Other)
    register("toy", family="cell", paper="again")(Toy)  # a module that is reloaded
    assert info("toy").paper == "again"


def test_families_properties_and_reasons_are_checked():
    with pytest.raises(ValueError, match=r"family: seen 'cells', wanted one of .*cell"):
        register("x", family="cells", paper="x")
    with pytest.raises(ValueError, match=r"exceptions: unknown properties \['causal'\], wanted some of .*causality"):
        register("x", family="cell", paper="x", exceptions={"causal": "bidirectional"})
    with pytest.raises(ValueError, match="exceptions: vmap lacks the reason"):
        register("x", family="cell", paper="x", exceptions={"vmap": " ", "drift": "chaotic"})
    assert {"causality", "constant_state"} <= PROPERTIES


@pytest.mark.parametrize("excused", ["causality", "streaming", "drift"])
def test_what_does_not_stream_is_no_layer_of_a_language_model(excused):
    register("toy", family="cell", paper="toys", exceptions={excused: "because"})(Toy)
    streams = excused == "drift"
    assert info("toy").streams == streams
    assert ("toy" in names(streaming=True)) == streams
    assert "toy" in names()
    assert registry.exceptions_of(Toy(4)) == {excused: "because"}
    assert registry.exceptions_of(nn.Linear(2, 2)) == {}


def test_did_you_mean_is_silent_when_nothing_is_close():
    assert did_you_mean("nothing", ["gla", "lstm"]) == ""
    assert did_you_mean("lsmt", ["gla", "lstm"]) == ", did you mean 'lstm'?"


def test_every_file_in_mixers_is_found():
    modules = {f"tidegate.mixers.{module.name}" for module in pkgutil.iter_modules(mixers.__path__)}
    assert modules <= {info(name).cls.__module__ for name in names()}


def test_a_mixer_that_does_not_import_is_an_error_every_time(monkeypatch):
    """Half a registry must never pass for the whole one."""

    def broken(name):
        raise ImportError(f"{name} is broken")

    monkeypatch.setattr(registry, "_discovered", False)
    monkeypatch.setattr(importlib, "import_module", broken)
    for _ in range(2):
        with pytest.raises(ImportError, match="is broken"):
            names()


def test_threads_that_ask_at_once_all_see_all(monkeypatch):
    every = names()
    monkeypatch.setattr(registry, "_discovered", False)
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(names())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [every] * 4
