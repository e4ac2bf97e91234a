"""No test that cannot fail: a correct mixer passes every check, and each broken one is caught by the check named."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator

import pytest
import torch

from tests.contract import (
    helpers,
    test_equality,
    test_gradients,
    test_module,
    test_numerics,
    test_state,
    test_transforms,
    toy,
)

MODULES = (test_equality, test_gradients, test_module, test_numerics, test_state, test_transforms)


def checks() -> dict[str, object]:
    """Every test of the suite by name."""
    return {
        name: function
        for module in MODULES
        for name, function in vars(module).items()
        if name.startswith("test_") and inspect.isfunction(function)
    }


def cases(function) -> Iterator[dict[str, object]]:
    """All combinations of a test's parametrised arguments."""
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    for values in itertools.product(*(mark.args[1] for mark in marks)):
        plain = [value.values[0] if hasattr(value, "marks") else value for value in values]  # of pytest.param
        yield {mark.args[0]: value for mark, value in zip(marks, plain, strict=True)}


def run(name: str, subject: helpers.Subject, tmp_path, monkeypatch) -> None:
    function = checks()[name]
    given = {"tmp_path": tmp_path, "monkeypatch": monkeypatch, "subject": subject}
    wanted = {key: value for key, value in given.items() if key in inspect.signature(function).parameters}
    for case in cases(function):
        torch._dynamo.reset()
        function(**wanted, **case)


@pytest.mark.parametrize("check", sorted(checks()))
def test_a_correct_mixer_passes(check: str, tmp_path, monkeypatch):
    run(check, toy.subject(toy.Ema), tmp_path, monkeypatch)


BROKEN = {
    "test_a_batch_is_its_documents_alone": (
        *(toy.LeaksAcrossDocuments, toy.WindowLeaks, toy.KeepsOldDocumentInState, toy.DecaysOnPadding),
        *(toy.WindowHoldsPadding, toy.WritesOnPadding, toy.ReadsPadding, toy.GradientToPadding),
        *(toy.DependsOnNeighbours,),
    ),
    "test_any_split_is_the_whole": (
        *(toy.PeeksAhead, toy.PeeksAheadWithinACall, toy.IgnoresState, toy.ForgetsLastToken, toy.DetachesState),
        toy.ComputesInSinglePrecision,
    ),
    "test_one_by_one_is_the_whole": (toy.IgnoresState, toy.DetachesState, toy.PeeksAhead),
    "test_one_by_one_through_documents_and_padding": (toy.WindowHoldsPadding, toy.PeeksAhead, toy.ReadsPadding),
    "test_splits_of_packed_and_padded_batches": (toy.WindowHoldsPadding, toy.DetachesState, toy.IgnoresState),
    "test_the_shortest_calls_with_documents_and_padding": (toy.LeaksAcrossDocuments, toy.WritesOnPadding),
    "test_every_switch_keeps_the_contract": (toy.LeaksWhenSwitched,),
    "test_no_state_is_the_initial_state": (toy.HidesState,),
    "test_a_state_can_be_continued_twice": (toy.MutatesState, toy.HidesState),
    "test_rows_can_be_selected_and_joined": (toy.StateNotByRow,),
    "test_a_saved_state_continues_bitwise": (toy.HidesState,),
    "test_the_size_of_the_state_is_constant": (toy.GrowsWithoutSayingSo,),
    "test_the_state_is_as_the_specification_says": (toy.StateInHalfPrecision,),
    "test_gradients_against_finite_differences": (toy.WrongGradient, toy.DetachedInside),
    "test_second_derivatives_against_finite_differences": (toy.DifferentiableOnce,),
    "test_second_derivatives_in_single_precision": (toy.KernelDifferentiableOnce,),
    "test_the_backends_agree": (toy.BackendsDisagree,),
    "test_the_past_does_not_depend_on_the_future": (toy.PeeksAhead, toy.PeeksAheadWithinACall),
    "test_the_dtype_that_goes_in_comes_out": (toy.LosesDtype,),
    "test_half_precision_is_the_same_function": (toy.WrongInHalfPrecision,),
    "test_extreme_gates_stay_finite": (toy.Overflows, toy.GradientOverflows),
    "test_the_number_of_threads_does_not_matter": (toy.DependsOnThreads,),
    "test_ten_thousand_steps_do_not_drift": (toy.Drifts,),
    "test_compile_as_one_graph": (toy.BranchesOnValues,),
    "test_compile_for_any_length": (toy.BranchesOnLength,),
    "test_export_for_any_length": (toy.BranchesOnLength, toy.BranchesOnValues),
    "test_vmap_over_an_ensemble": (toy.BranchesOnValues,),
    "test_the_configuration_rebuilds_the_module": (toy.ForgetsConfig,),
    "test_every_option_but_dim_has_a_default": (toy.PositionalOption,),
    "test_the_dtype_of_the_weights": (toy.IgnoresDtype,),
    "test_construction_on_the_meta_device": (toy.IgnoresDevice,),
    "test_reset_parameters_sets_everything_and_follows_the_seed": (toy.ResetsHalf, toy.ConstructionIsNotReset),
    "test_a_module_on_the_meta_device_becomes_real": (toy.ResetsHalf,),
    "test_no_weight_decay_names_parameters": (toy.NamesNoParameter,),
    "test_copies_pickles_and_state_dicts": (toy.NotPicklable, toy.HidesState),
    "test_every_weight_matters": (toy.DeadWeight,),
    "test_an_empty_batch": (toy.WantsARow,),
    "test_errors_name_the_argument": (toy.ChecksNothing,),
    "test_a_call_does_not_write_to_its_input": (toy.WritesToInput,),
    "test_the_initial_state_is_zero_and_new": (toy.StartsFromOnes,),
    "test_a_misspelt_option_names_the_right_one": (toy.TakesAnything,),
}


@pytest.mark.parametrize(
    ("check", "broken"),
    [(check, cls) for check, classes in BROKEN.items() for cls in classes],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_broken_mixer_is_caught(check: str, broken, tmp_path, monkeypatch):
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        run(check, toy.subject(broken), tmp_path, monkeypatch)
    assert not isinstance(caught.value, (KeyboardInterrupt, SystemExit))


def test_every_check_is_shown_to_fail():
    assert set(BROKEN) == set(checks())


# -- exceptions --------------------------------------------------------------------------------------------------------
STREAMING = (
    *("test_any_split_is_the_whole", "test_one_by_one_is_the_whole", "test_splits_of_packed_and_padded_batches"),
    "test_one_by_one_through_documents_and_padding",
)


def test_an_excuse_is_accepted_where_it_is_needed(tmp_path, monkeypatch):
    excused = toy.subject(toy.PeeksAhead, causality="looks at the whole call")
    run("test_the_past_does_not_depend_on_the_future", excused, tmp_path, monkeypatch)
    excused = toy.subject(toy.GrowsWithoutSayingSo, constant_state="keeps every token")
    run("test_the_size_of_the_state_is_constant", excused, tmp_path, monkeypatch)
    excused = toy.subject(toy.IgnoresState, streaming="wants the whole")
    for check in STREAMING:
        run(check, excused, tmp_path, monkeypatch)


def test_an_excuse_that_is_not_needed_or_not_explained_is_refused(tmp_path, monkeypatch):
    for excused in (toy.subject(toy.Ema, drift="chaotic"), toy.subject(toy.Drifts, drift=" ")):
        with pytest.raises(BaseException, match=r"DID NOT RAISE|gives no reason"):
            run("test_ten_thousand_steps_do_not_drift", excused, tmp_path, monkeypatch)
    for check in STREAMING:
        with pytest.raises(BaseException, match="DID NOT RAISE"):
            run(check, toy.subject(toy.Ema, streaming="wants the whole"), tmp_path, monkeypatch)


# -- the comparison ----------------------------------------------------------------------------------------------------
def test_the_comparison_notices_shapes_nan_integers_and_small_errors():
    wanted = {"a": torch.ones(3), "n": torch.tensor([1, 2])}
    helpers.assert_near({"a": torch.ones(3) + 1e-6, "n": torch.tensor([1, 2])}, wanted, 1e-5, "numbers")
    for wrong in (
        {"a": torch.ones(3) + 1e-4, "n": torch.tensor([1, 2])},
        {"a": torch.full((3,), float("nan")), "n": torch.tensor([1, 2])},
        {"a": torch.ones(1), "n": torch.tensor([1, 2])},
        {"a": torch.ones(3), "n": torch.tensor([1, 3])},
        {"a": torch.ones(3)},
    ):
        with pytest.raises(AssertionError):
            helpers.assert_near(wrong, wanted, 1e-5, "numbers")


def test_the_kinds_of_segments_are_what_they_are_called():
    draw = test_equality.drawn("kinds")
    for time in helpers.LENGTHS:
        for kind in helpers.KINDS:
            segments = helpers.segments_of(kind, 3, time, draw)
            assert (segments is None) == (kind == "whole")
            if segments is None:
                continue
            assert segments.shape == (3, time)
            assert segments.starts.any() or kind not in ("packed",)
            if kind.startswith("packed") and "holes" not in kind:
                assert segments.valid.all()
            if kind == "blank_row":
                assert not segments.valid[1].any()
    with pytest.raises(ValueError, match="nothing"):
        helpers.segments_of("nothing", 1, 2, draw)
