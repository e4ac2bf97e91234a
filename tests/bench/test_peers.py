"""The comparison with peers, between two processes of this interpreter: no peer is installed for it."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from tidegate import mixers
from tidegate.bench import peer_inputs, peer_report, peers
from tidegate.bench.peer_process import PeerError, PeerProcess, difference
from tidegate.bench.peers import Comparison, Point, Row, Side

FOLDER = Path(__file__).parents[2] / "bench" / "peers"
AT = Point(threads=1, batch=1, length=128, dim=8)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Two workers with the toy adapters."""
    folder = tmp_path_factory.mktemp("peers")
    for source in (FOLDER / "worker.py", FOLDER / "adapter.py", Path(__file__).with_name("toy_peer.py")):
        (folder / source.name).write_text(source.read_text())
    modules = ["toy_peer", "not_installed"]
    with (
        PeerProcess(sys.executable, folder, modules, threads=1) as a,
        PeerProcess(sys.executable, folder, modules) as b,
    ):
        yield a, b


def compare(sides, key, at=AT):
    entry = sides[1].ask("adapters")["adapters"][key]
    return list(Comparison(repetitions=1, shortest=0.0, pause=0.0).rows(*sides, key, entry, at))


def test_a_worker_names_its_adapters_and_what_is_missing(sides):
    answer = sides[0].ask("adapters")
    assert answer["adapters"]["op/scan right"] == ["op/scan", "right", ""]
    assert answer["missing"]["not_installed"].startswith("ModuleNotFoundError")
    assert answer["versions"]["torch"] == torch.__version__


def test_both_sides_get_the_threads_asked_for(sides):
    assert [side.ask("limit", threads=1) for side in sides] == [{"threads": 1}] * 2


@pytest.mark.parametrize("key", ["op/scan right", "layer/lstm right"])
def test_the_same_function_is_timed_in_both_phases(sides, key):
    rows = compare(sides, key)
    assert [row.phase for row in rows] == ["forward", "training"]
    assert all(row.error < 1e-5 and row.ratio > 0 for row in rows)


def test_a_decode_step_keeps_its_state(sides):
    (row,) = compare(sides, "decode/lstm right")
    assert row.phase == "decode"
    assert row.error < 1e-6
    assert row.ratio > 0


def test_another_function_is_no_comparison(sides):
    (row,) = compare(sides, "op/scan wrong")
    assert row.error > peers.TOLERANCE
    assert row.ratio is None
    assert "computes something else" in row.note


def test_other_gradients_leave_only_the_forward(sides):
    forward, training = compare(sides, "op/scan wrong gradients")
    assert forward.ratio is not None
    assert training.ratio is None
    assert "d a" in training.note


def test_what_a_peer_raises_is_in_the_row_and_the_next_one_runs(sides):
    (row,) = compare(sides, "op/scan broken")
    assert "the peer failed" in row.note
    assert "no triton here" in row.note
    assert compare(sides, "op/scan right")[0].ratio is not None


def test_a_peer_that_runs_out_of_memory_is_compared_at_the_length_it_can_do(sides):
    rows = compare(sides, "op/scan short", Point(1, 1, 512, 0))
    assert {row.length for row in rows} == {128}
    assert all("T = 512: more memory than allowed" in row.note and row.ratio is not None for row in rows)


def test_a_slow_peer_is_compared_at_a_smaller_length(sides):
    entry = ["op/scan", "right", ""]
    how = Comparison(repetitions=1, seconds=1e-6, shortest=0.0, pause=0.0)
    rows = list(how.rows(*sides, "op/scan right", entry, Point(1, 1, 512, 0)))
    assert {row.length for row in rows} == {128}
    assert "T = 512: more than" in rows[0].note


def test_peak_memory_is_that_of_the_step(sides):
    row = Comparison().memory(*sides, "op/scan right", ["op/scan", "right", ""], Point(1, 1, 512, 0), 8.0)
    inputs = 4 * 512 * 1024
    assert row.length == 512
    assert inputs < row.ours.seconds < 100 * inputs


def test_a_process_that_is_gone_is_an_error(tmp_path):
    (tmp_path / "worker.py").write_text("raise SystemExit(3)")
    with pytest.raises(PeerError, match="code 3"):
        PeerProcess(sys.executable, tmp_path, [])


def test_difference_is_relative_and_takes_the_worst():
    one = {"a": torch.ones(4), "b": torch.ones(4)}
    assert difference(one, {"a": torch.ones(4), "b": 2 * torch.ones(4)}) == (0.5, "b")
    assert difference(one, one) == (0.0, "")
    assert difference({"a": torch.zeros(2)}, {"a": torch.zeros(2)}) == (0.0, "")


@pytest.mark.parametrize(
    "theirs", [{}, {"a": torch.ones(3)}, {"a": torch.full((2,), math.nan)}, {"a": torch.ones(2), "b": torch.ones(2)}]
)
def test_difference_is_infinite_where_nothing_can_be_compared(theirs):
    assert difference({"a": torch.ones(2)}, theirs)[0] == math.inf


def test_ratio_is_theirs_over_ours():
    row = Row("op/scan", "x", "training", 1, 1, 512, 0, 0.0, Side(2.0, 0.0, 1), Side(9.0, 0.0, 1), target=5.0)
    assert row.ratio == 4.5
    assert row.reached is False
    assert "5 missed" in peer_report.cells(row)
    assert Row("op/scan", "x", "", 1, 1, 512, 0).ratio is None


def test_median_and_spread():
    assert peers.summary([4.0]) == Side(4.0, 0.0, 1)
    assert peers.summary([1.0, 2.0, 3.0, 4.0, 10.0]) == Side(3.0, 2 / 3, 5)


@pytest.mark.parametrize("function", [*peer_inputs.OPS, "layer/lstm", "decode/lstm", "decode/model/mamba2"])
def test_inputs_are_the_same_at_every_call(function):
    first, second = (peer_inputs.draw(function, 2, 16, 8) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    weights = ("a", "d", "matrices", "bias")
    assert all(x.shape[:2] in ((1, 16), (2, 16)) for n, x in first.items() if n not in weights or x.ndim == 3)


@pytest.mark.parametrize("name", ["slstm", "lstm", "gru"])
def test_a_cell_is_drawn_with_what_its_equations_take(name):
    cell = mixers.build(name, dim=4).cell
    inputs = peer_inputs.draw(f"op/{name}", 2, 16, 0)
    assert inputs["x"].shape == (2, 16, len(cell.inputs), 4, 64)
    assert inputs["matrices"].shape == (len(cell.matrices), 4, 64, 64)
    assert ("bias" in inputs) == bool(cell.vectors)
    assert inputs["cotangent"].shape == (2, 16, 4, 64)  # a gradient for h, not for what the gates get


def test_a_loop_is_to_be_left_further_behind():
    assert peer_inputs.target("op/linear_attention/key", "training", "") == 2
    assert peer_inputs.target("op/linear_attention/key", "training", "loop") == 20
    assert peer_inputs.target("op/linear_attention/key", "forward", "loop") == 1.5
    assert peer_inputs.target("layer/gru", "forward", "") == 1.3
    assert peer_inputs.target("op/slstm", "training", "loop") == 15  # ours is a loop too
    assert peer_inputs.target("op/slstm", "forward", "loop") == 1.5


def test_results_are_written_as_json_table_and_picture(tmp_path):
    side = Side(1.0, 0.0, 1)
    rows = [
        Row("op/scan", "x", "forward", 1, 1, 512, 0, 0.0, side, Side(3.0, 0.0, 1), 1.5),
        Row("op/scan", "y", "", 1, 1, 512, 0),
    ]
    peer_report.write(tmp_path / "new", "peers", {"results": [row.phase for row in rows]}, rows)
    assert json.loads((tmp_path / "new" / "peers.json").read_text()) == {"results": ["forward", ""]}
    assert (tmp_path / "new" / "peers.md").read_text().count("\n") == 4
    assert (tmp_path / "new" / "peers.png").stat().st_size > 1000


def test_without_the_adapters_the_command_says_where_to_stand(tmp_path, capsys):
    with pytest.raises(SystemExit):
        peers.parse(["--adapters", str(tmp_path)])
    assert "root of a clone" in capsys.readouterr().err
