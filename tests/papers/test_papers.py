"""The frame for reproductions: how a verdict follows from numbers, what is written, and every paper's declaration."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

from tidegate import papers as package
from tidegate.papers import Check, Experiment, Measured, Paper, Situation, experiment, hybrid_linear_attention, report
from tidegate.papers.gla import _inputs, quadratic, step_loop


def paper(*by_seed, bound=1.0, extra=()):
    """A paper whose only system measures `by_seed`; `extra` are further experiments."""

    def draw(panel, measured):
        panel.plot([m.numbers["ours"]["loss"] for m in measured])

    def measure(seed, situation):
        return Measured({"ours": {"loss": by_seed[seed]}}, {"ours": [1.0, by_seed[seed]]})

    checks = (Check("our loss", lambda n: n["ours"]["loss"], "<", bound),)
    first = Experiment("losses", "Nothing is trained.", measure, checks, draw)
    return Paper("p", "A title", "1234.56789", ("ours",), "Ours is low.", "Below 1.", (first, *extra), notes="None.")


def verdict(wanted, seeds):
    return experiment.run(wanted, seeds, Situation())[0]["verdict"]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ((0.1, 0.2, 0.3), "holds"),
        ((0.1, 0.2, 1.3), "inconclusive"),  # the median meets it, a third of the seeds does not
        ((0.1, 1.2, 1.3), "inconclusive"),
        ((1.1, 1.2, 1.3), "does not hold"),
        ((0.1, 0.2, 0.3, 1.3), "holds"),  # three quarters
        ((0.1, 0.2), "inconclusive"),  # too few
        ((1.5,), "inconclusive"),
        ((0.1, 0.2, math.nan), "inconclusive"),
        ((0.1, 0.2, -math.inf), "inconclusive"),
        ((1.0, 1.0, 1.0), "does not hold"),  # the bound itself is outside
    ],
)
def test_the_verdict_follows_from_medians_and_seeds(values, wanted):
    assert verdict(paper(*values), len(values)) == wanted


def once(value, deciding):
    check = Check("speed", lambda n: n["ours"]["loss"], ">=", 5.0, deciding=deciding)
    calls = []

    def measure(seed, situation):
        calls.append(seed)
        return Measured({"ours": {"loss": value}})

    return Experiment("speed", "", measure, (check,), lambda panel, measured: None, seeded=False), calls


def test_an_experiment_without_seeds_runs_once_and_may_decide():
    slow, calls = once(2.0, deciding=True)
    assert verdict(paper(0.1, 0.2, 0.3, extra=[slow]), 3) == "does not hold"
    assert calls == [0]
    fast, _ = once(7.0, deciding=True)
    assert verdict(paper(0.1, 0.2, 0.3, extra=[fast]), 3) == "holds"


def test_a_check_that_does_not_decide_is_reported_only():
    slow, _ = once(2.0, deciding=False)
    record, _ = experiment.run(paper(0.1, 0.2, 0.3, extra=[slow]), 3, Situation())
    assert record["verdict"] == "holds"
    assert record["experiments"][1]["checks"][0]["met"] is False


def test_smoke_has_no_verdict():
    record, _ = experiment.run(paper(0.1), 1, Situation(smoke=True))
    assert record["verdict"] is None


def test_seeds_are_set_and_the_callers_random_numbers_go_on():
    def measure(seed, situation):
        return Measured({"ours": {"loss": torch.rand(()).item()}})

    drawn = Experiment("x", "", measure, (), lambda panel, measured: None)
    wanted = Paper("p", "t", "1", (), "", "", (drawn,))
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    first = experiment.run(wanted, 2, Situation())[1][0]
    assert torch.rand(()) == expected
    assert first == experiment.run(wanted, 2, Situation())[1][0]
    assert first[0] != first[1]


def test_no_seeds_is_an_error():
    with pytest.raises(ValueError, match="seeds: seen 0"):
        experiment.run(paper(), 0, Situation())


# -- files -------------------------------------------------------------------------------------------------------------
def write(folder, wanted, seeds):
    record, measured = experiment.run(wanted, seeds, Situation())
    report.write(folder, wanted, record, measured, "tidegate reproduce p")
    return record


def test_the_record_is_complete_and_read_back(tmp_path):
    write(tmp_path, paper(0.1, 0.25, 0.3), 3)
    seen = report.read(tmp_path)
    assert seen == json.loads((tmp_path / "results.json").read_text())
    assert seen["verdict"] == "holds"
    assert seen["seeds"] == [0, 1, 2]
    assert seen["command"] == "tidegate reproduce p"
    assert seen["machine"]["torch"] == torch.__version__
    assert [m["numbers"]["ours"]["loss"] for m in seen["experiments"][0]["measured"]] == [0.1, 0.25, 0.3]
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_for_people_has_claim_numbers_and_verdict(tmp_path):
    write(tmp_path, paper(0.1, 0.25, 0.3), 3)
    text = (tmp_path / "results.md").read_text()
    assert "**Claim.** Ours is low." in text
    assert "**holds**" in text
    assert "| ours | 0.25 (0.1 to 0.3) |" in text
    assert "| our loss | < 1 | 0.25 | 0.1, 0.25, 0.3 | yes |" in text


def test_a_number_that_is_not_finite_is_said_so(tmp_path):
    write(tmp_path, paper(0.1, math.nan, 0.3), 3)
    assert report.read(tmp_path)["experiments"][0]["measured"][1]["numbers"]["ours"]["loss"] is None
    assert "not finite" in (tmp_path / "results.md").read_text()


def test_no_report_and_a_damaged_one(tmp_path):
    assert report.read(tmp_path) is None
    for content in ("{", "[]", '{"paper": "p"}'):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match=r"results.json: not a record"):
            report.read(tmp_path)


# -- the papers --------------------------------------------------------------------------------------------------------
def test_every_paper_says_what_it_claims():
    for slug, known in package.papers().items():
        assert known.slug == slug
        assert re.fullmatch(r"\d{4}\.\d{5}", known.arxiv)
        assert known.title
        assert known.claim.endswith(".")
        assert known.threshold.endswith(".")
        assert any(check.deciding for tried in known.experiments for check in tried.checks)


def test_an_unknown_paper_names_the_closest():
    with pytest.raises(ValueError, match="there is no 'glaa', did you mean 'gla'"):
        package.paper("glaa")


def test_the_two_plain_forms_of_gla_agree():
    inputs = [x.double() for x in _inputs(2, 19, 2, 4, 6)]
    torch.testing.assert_close(step_loop(*inputs), quadratic(*inputs), rtol=1e-10, atol=1e-10)


def test_hybrid_stacks():
    names = {
        system: [name for name, _ in hybrid_linear_attention.stack(system, hybrid_linear_attention.LINEAR, ("x", {}))]
        for system in hybrid_linear_attention.STACKS
    }
    assert names["GLA, 3:1"] == ["gla", "gla", "gla", "x"]
    assert names["RetNet, pure"] == ["retnet"] * 4
    assert names["full attention"] == ["x"] * 4
