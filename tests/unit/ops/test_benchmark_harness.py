"""The benchmarks' harness: a red check is not timed, nothing measured is an error, times are taken in
turn."""

import json
import os
from dataclasses import asdict

import pytest
import torch

from benchmarks.bench_log_prob import check
from benchmarks.harness import Task, Timing, command_line, in_process, measure, save
from benchmarks.kernel_harness import Row, finish, table
from benchmarks.log_prob_providers import Provider, ours
from benchmarks.roofline import draw
from benchmarks.shapes import Shape

CPU = torch.device("cpu")
SHAPE = Shape("small", 64, 8, 301, 0.5)


def test_a_wrong_provider_does_not_pass_the_gate():
    good = ours("reference", CPU)
    wrong = Provider("off by a little", None, lambda x, t, w: (good.step(x, t, w)[0] + 0.2, x))
    assert check(good, SHAPE, CPU, torch.float32)["log p"] < 1e-5
    with pytest.raises(ValueError, match=r"log p is 0\.2 off float64"):
        check(wrong, SHAPE, CPU, torch.float32)


def test_nothing_measured_is_an_error():
    with pytest.raises(RuntimeError, match="nothing was measured: peer: not installed"):
        finish([Row("case", "peer", skipped="not installed")], "peer", floor_s=lambda row: 0.0)


def test_providers_take_turns_and_inputs_are_restored_each_round():
    calls = []
    tasks = {
        name: Task(lambda n=name: calls.append(n), lambda n=name: calls.append(f"prepare {n}"))
        for name in ("a", "b")
    }
    timings = measure(tasks, CPU, seconds=0.0, fewest=3)
    assert [timing.rounds for timing in timings.values()] == [3, 3]
    assert calls[-8:] == ["prepare a", "a", "prepare b", "b"] * 2


def test_the_result_names_what_made_it_and_is_drawn(tmp_path):
    rows = [
        Row("case", "ours", timing=Timing(1.0, 0.9, 1.1, 5, None), bytes_moved=4e6, flops=4e6),
        Row("case", "peer", timing=Timing(2.0, 1.9, 2.1, 5, None), bytes_moved=4e6, flops=4e6),
    ]
    finish(rows, "peer", floor_s=lambda row: 0.5e-3)
    assert (rows[0].ratio, rows[0].percent_of_ceiling) == (2.0, 50.0)
    ceilings = {"copy_bytes_per_s": 1e10, "read_bytes_per_s": 2e10, "matmul_flops_per_s": 1e12}
    result = {"ceilings": ceilings, "rows": [asdict(row) for row in rows]}
    path = save("benchmarks/bench_example.py", result, CPU, tmp_path)
    assert path == tmp_path / "example.json"
    about = json.loads(path.read_text())["about"]
    assert (
        about["versions"]["torch"] == torch.__version__.split("+")[0]
        or about["versions"]["torch"] == torch.__version__
    )
    assert about["commit"]
    assert " 1.00" not in table(rows, with_times=False).split("peer")[0], (
        "a CPU's table shows ratios, not milliseconds"
    )
    pytest.importorskip("matplotlib")
    png, svg = draw(path)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()


def test_one_command_line(monkeypatch, capsys):
    options = {"steps": (5, "n"), "layers": (int, "n"), "dtype": (("a", "b"), "n"), "ragged": (False, "n")}
    monkeypatch.setattr(
        "sys.argv", ["bench", "--layers", "2", "--dtype", "b", "--ragged", "--data.path", "x"]
    )
    parsed = command_line("", flags=True, **options)
    assert (parsed.steps, parsed.layers, parsed.dtype, parsed.ragged, parsed.out) == (5, 2, "b", True, None)
    assert parsed.flags == ["--data.path", "x"]
    for required, arguments in ((["layers"], []), ([], ["--data.path", "x"]), ([], ["--dtype", "c"])):
        monkeypatch.setattr("sys.argv", ["bench", *arguments])
        with pytest.raises(SystemExit) as ended:
            command_line("", required=required, **options)
        assert ended.value.code == 2 and "error: " in capsys.readouterr().err


def environment_value(name):
    return os.environ.get(name)


def test_a_side_runs_in_a_process_of_its_own(monkeypatch):
    monkeypatch.delenv("RLSC_SIDE", raising=False)
    assert in_process(environment_value, "RLSC_SIDE", environment={"RLSC_SIDE": "1"}) == "1"
    assert "RLSC_SIDE" not in os.environ
    with pytest.raises(RuntimeError, match="_exit: the process ended without a result"):
        in_process(os._exit, 3)
