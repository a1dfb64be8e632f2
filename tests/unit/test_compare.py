"""Comparisons and sweeps: gathered numbers by hand, finished runs left alone, every bad option refused before
a run begins."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlsc_mcore.commands.compare import run_compare
from rlsc_mcore.commands.sweep import run_sweep
from rlsc_mcore.config import ConfigError
from rlsc_mcore.config_file import dump_config, load_config
from rlsc_mcore.evaluation.over_seeds import summarize
from rlsc_mcore.evaluation.records import AnswerRecord, QuestionRecord, write_records
from rlsc_mcore.experiments.runs import Experiment, Variant, grid

CONFIG = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"


def answers(rates: dict[int, list[bool]], temperatures: tuple[float, ...]) -> list[AnswerRecord]:
    return [
        AnswerRecord(
            question,
            temperature,
            sample,
            "8",
            f"{right}",
            "8" if right else "7",
            right,
            right,
            True,
            False,
            5,
            -1.0 - right,
        )
        for temperature in temperatures
        for question, samples in rates.items()
        for sample, right in enumerate(samples[: 1 if temperature == 0 else None])
    ]


def write_run(
    folder: Path,
    after: dict[int, list[bool]],
    *,
    temperatures: tuple[float, ...] = (0.0, 0.5, 1.0),
    trained: bool = True,
) -> None:
    questions = [QuestionRecord(question, "1+7?", "8", "1+7?") for question in after]
    before = {question: [False] * len(samples) for question, samples in after.items()}
    for name, rates in (("before", before), ("after", after)) if trained else (("after", after),):
        write_records(
            folder / "evaluation",
            name,
            {"scores": {}, "answers": answers(rates, temperatures), "questions": questions},
        )
    if trained:
        (folder / "summary.json").write_text("{}", encoding="utf-8")


def test_each_objective_gets_the_rate_of_the_best_validation_accuracy(tmp_path: Path) -> None:
    """Finished runs of two rates: each objective takes its own best one, the smaller one of two equal
    ones."""
    right, half, wrong = {0: [True, True]}, {0: [True, False]}, {0: [False, False]}
    tried = {"rlsc_lr1e-4": half, "rlsc_lr1e-3": right, "entropy_lr1e-4": half, "entropy_lr1e-3": half}
    for name, rates in tried.items():
        write_run(tmp_path / "validation" / f"{name}_seed0", rates)
    for name, rates in (("rlsc", half), ("entropy", wrong)):
        for seed, seconds in ((0, 2.0), (1, 4.0)):
            folder = tmp_path / f"{name}_seed{seed}"
            write_run(folder, rates)
            scale = 2 if name == "entropy" else 1
            times = {"rollout": scale * seconds, "train": scale * 1.0}
            row = {"mean_length": 2.5, "num_samples": 8, "train_tokens": 30 * scale, "seconds": times}
            (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    arguments = ["--config", str(CONFIG), "--output", str(tmp_path), "--objectives", "rlsc,entropy"]
    arguments += ["--seeds", "0,1", "--learning-rates", "1e-4,1e-3", "--evaluation.num-samples", "2"]
    arguments += ["--validation", "embedded:validation"]
    assert run_compare(arguments) == 0
    result = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    rates = result["learning_rates"]
    assert {name: row["rate"] for name, row in rates.items()} == {"rlsc": "1e-3", "entropy": "1e-4"}
    # One greedy answer, the first one, and two answers at T = 0.5 and at T = 1.
    assert rates["rlsc"]["accuracy"] == {"1e-4": pytest.approx((1 + 0.5 + 0.5) / 3), "1e-3": 1.0}
    rows = result["rows"]
    assert rows["rlsc"]["pass@2"]["mean"] == 1.0 and rows["rlsc"]["maj@2"]["mean"] == 0.5
    assert rows["rlsc"]["distinct_share"]["mean"] == 1.0 and rows["entropy"]["distinct_share"]["mean"] == 0.5
    assert result["pairs"]["entropy - rlsc"]["pass@2"]["change"]["mean"] == -1.0
    cost = result["costs"]["entropy"]
    assert (cost["sampled_tokens"], cost["trained_tokens"], cost["step_seconds"]) == (20.0, 60.0, 8.0)
    assert result["costs"]["rlsc"]["step_seconds"] == 4.0 and cost["relative_step_time"] == 2.0
    table = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert "| rlsc | 1e-3 | 20 | 30 | 1.00 |" in table and "| entropy | 1e-4 | 20 | 60 | 2.00 |" in table


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--learning-rates", "1e-4,0.0001"], "expected different positive numbers"),
        (["--learning-rates", "fast"], "expected different positive numbers"),
        (["--learning-rates", "1e-4,-1"], "expected different positive numbers"),
        (["--learning-rates", "1e-4,nan"], "expected different positive numbers"),
        (["--learning-rates", "1e-4"], "--validation: expected the questions that choose"),
        (["--learning-rates", "1e-4", "--validation", "embedded:test"], "other ones than evaluation.path"),
        (["--learning-rates", "1e-4", "--validation", "none.jsonl"], "--validation: .*none.jsonl"),
        (["--learning-rates", "1e-4", "--optimizer.lr=1e-3"], "give only one of the two"),
    ],
)
def test_bad_learning_rates_are_refused(tmp_path: Path, more: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        run_compare(["--config", str(CONFIG), "--output", str(tmp_path / "new"), *more])
    assert not (tmp_path / "new").exists()


def test_a_finished_comparison_is_gathered_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {0: [True, True], 1: [True, False], 2: [False, False], 3: [True, True]}
    for seed in (0, 1):
        write_run(tmp_path / f"rlsc_seed{seed}", rates)
        write_run(
            tmp_path / f"lower_temperature_seed{seed}", rates, temperatures=(0.0, 0.25, 0.5), trained=False
        )
    code = run_compare(
        [
            "--config",
            str(CONFIG),
            "--output",
            str(tmp_path),
            "--objectives",
            "rlsc,lower_temperature",
            "--seeds",
            "0,1",
            "--optimizer.lr",
            "1e-4",
        ]
    )
    assert code == 0
    result = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert (result["questions"], result["seeds"], list(result["rows"])) == (
        4,
        [0, 1],
        ["base", "rlsc", "lower_temperature"],
    )
    for name in (
        "rlsc",
        "lower_temperature",
    ):  # the lowered temperatures answer under the names they stand in for
        row = result["rows"][name]["accuracy_t0.5"]
        assert row["mean"] == pytest.approx(2.5 / 4) and row["per_seed"] == pytest.approx([2.5 / 4] * 2)
        assert row["change"]["mean"] == pytest.approx(2.5 / 4) and row["seed_spread"] == 0
        assert row["change"]["p_value"] == 2 / 8  # three questions changed, all one way
    assert result["rows"]["base"]["accuracy_t1"]["mean"] == 0 and result["settings"]["flags"] == [
        "--optimizer.lr",
        "1e-4",
    ]
    figure = (tmp_path / "comparison.svg").read_text(encoding="utf-8")
    assert figure.startswith("<svg ") and "lower_temperature" in figure
    table = (tmp_path / "comparison.md").read_text(encoding="utf-8").splitlines()
    assert table[2].startswith("| base | 0.000 |") and table[3].startswith(
        "| rlsc | 0.625 (+0.625 +- 0.239) |"
    )
    pair = result["pairs"]["lower_temperature - rlsc"]["accuracy_t0.5"]["change"]
    assert (
        pair["mean"] == 0
        and pair["corrected_p_value"] == 1
        and pair["over_seeds"]["low"] < 0 < pair["over_seeds"]["high"]
    )
    assert any(line.startswith("| lower_temperature - rlsc | +0.000 (-0.") for line in table)
    assert "4 questions, 2 seeds" in capsys.readouterr().out
    assert not list((tmp_path / "logs").iterdir())


def test_a_finished_sweep_is_gathered_without_a_run(tmp_path: Path) -> None:
    for alpha, right in (("0", True), ("0.1", False)):
        write_run(tmp_path / f"alpha={alpha}_seed0", {0: [right] * 2, 1: [True] * 2})
    assert (
        run_sweep(["--config", str(CONFIG), "--output", str(tmp_path), "--over", "algorithm.alpha=0,0.1"])
        == 0
    )
    rows = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))["rows"]
    assert {name: row["greedy"]["mean"] for name, row in rows.items()} == {
        "base": 0,
        "alpha=0": 1,
        "alpha=0.1": 0.5,
    }
    assert "alpha 0.1: 0.5" in (tmp_path / "sweep.svg").read_text(encoding="utf-8")
    assert "| alpha=0 |" in (tmp_path / "sweep.md").read_text(encoding="utf-8")


def test_seeds_are_averaged_within_a_question_first() -> None:
    # Two seeds whose errors cancel question by question: the mean over seeds has no spread over questions.
    first, second = {0: [True] * 2, 1: [False] * 2}, {0: [False] * 2, 1: [True] * 2}
    nothing = {0: [False] * 2, 1: [False] * 2}
    rows = summarize(
        [answers(nothing, (1.0,))] * 2,
        [answers(first, (1.0,)), answers(second, (1.0,))],
        {"accuracy": (1.0, "strict")},
    )
    assert rows["accuracy"]["mean"] == 0.5 and rows["accuracy"]["standard_error"] == 0


def test_grid_holds_every_combination_once() -> None:
    variants = grid({"algorithm.alpha": ["0", "0.1"], "rollout.num_samples": ["4", "16"]})
    assert [variant.name for variant in variants] == [
        f"alpha={a}_num_samples={n}" for a in ("0", "0.1") for n in ("4", "16")
    ]
    assert variants[3].flags == ("--algorithm.alpha=0.1", "--rollout.num-samples=16")


def test_an_unfinished_run_shares_the_base_of_a_finished_one(tmp_path: Path) -> None:
    experiment = Experiment(CONFIG, (), (0,), tmp_path)
    done, left = Variant("rlsc"), Variant("entropy", ("--algorithm.objective=entropy",))
    write_run(experiment.run_dir(done, 0), {0: [True]})
    other_model = Variant("other", ("--model.path=x",))
    for variant in (left, other_model):
        experiment._share_base(variant, [done, left, other_model], 0)
    assert experiment.answers(left, 0, "before") == experiment.answers(done, 0, "before") != []
    assert experiment.answers(other_model, 0, "before") == []
    assert not experiment.is_done(left, 0) and experiment.is_done(done, 0)


def test_a_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    experiment = Experiment(CONFIG, (), (0,), tmp_path)
    config = load_config(CONFIG, ["--run-dir", str(tmp_path / "rlsc_seed0"), "--optimizer.lr", "1"])
    write_run(tmp_path / "rlsc_seed0", {0: [True]})
    (tmp_path / "rlsc_seed0" / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    from rlsc_mcore.observability.console import Reporter

    wanted = re.escape(f"another configuration (optimizer.lr: 1.0 -> {load_config(CONFIG).optimizer.lr})")
    with pytest.raises(ConfigError, match=wanted):
        experiment.run([Variant("rlsc")], Reporter(enabled=False))


def evaluation(folder: Path, name: str, rates: dict[int, list[bool]], text: str = "1+7?") -> None:
    questions = [QuestionRecord(question, text, "8", text) for question in rates]
    write_records(folder, name, {"scores": {}, "answers": answers(rates, (0.0, 0.5)), "questions": questions})


def test_finished_evaluations_are_paired_and_corrected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong = [True, True], [False, False]
    for name, count in (("a", 8), ("b", 5)):  # benchmark a: all 8 questions change, b: all 5 do
        evaluation(tmp_path / "one", f"{name}.chat", dict.fromkeys(range(count), wrong))
        evaluation(tmp_path / "two", f"{name}.chat", dict.fromkeys(range(count), right))
    evaluation(tmp_path / "two", "c.chat", {0: right})  # only one side has it
    arguments = ["--runs", str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(tmp_path / "out")]
    assert run_compare(arguments) == 0
    rows = json.loads((tmp_path / "out" / "paired.json").read_text(encoding="utf-8"))
    sampled = {
        row["benchmark"]: row for row in rows if row["temperature"] == 0.5 and row["graded"] == "boxed"
    }
    assert list(sampled) == ["a.chat", "b.chat"]
    assert (sampled["a.chat"]["p_value"], sampled["b.chat"]["p_value"]) == (2 / 2**8, 2 / 2**5)
    assert (
        sampled["a.chat"]["corrected_p_value"] == 2 * 2 / 2**8
        and sampled["b.chat"]["corrected_p_value"] == 2 / 2**5
    )
    assert sampled["a.chat"]["change"] == 1.0 and 0.5 < sampled["a.chat"]["low"] < 1
    assert "corrected" in capsys.readouterr().out


def test_two_trained_runs_are_compared_after_training(tmp_path: Path) -> None:
    for name, right in (("first", [True, False]), ("second", [True, True])):
        write_run(tmp_path / name, dict.fromkeys(range(6), right))
        (tmp_path / name / "config.yaml").write_text("", encoding="utf-8")
    assert (
        run_compare(["--runs", str(tmp_path / "second"), str(tmp_path / "first"), "--output", str(tmp_path)])
        == 0
    )
    rows = json.loads((tmp_path / "paired.json").read_text(encoding="utf-8"))
    (row,) = [row for row in rows if row["temperature"] == 0.5 and row["graded"] == "boxed"]
    assert (row["first_mean"], row["second_mean"], row["change"], row["p_value"]) == (
        1.0,
        0.5,
        -0.5,
        2 / 2**6,
    )


def test_what_cannot_be_paired_is_refused(tmp_path: Path) -> None:
    evaluation(tmp_path / "one", "a.chat", {0: [True, True]})
    evaluation(tmp_path / "two", "b.chat", {0: [True, True]})
    evaluation(tmp_path / "three", "a.chat", {0: [True, True]}, text="another?")
    (tmp_path / "empty").mkdir()
    for names, message in (
        (["one"], "--runs: expected two folders or more"),
        (["one", "one"], "--runs: expected different folders"),
        (["one", "two"], "share no benchmark"),
        (["one", "three"], "question 0 is another one"),
        (["one", "empty"], "neither a run nor a folder of rlsc eval"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_compare(["--runs", *(str(tmp_path / name) for name in names)])
    with pytest.raises(ConfigError, match="takes no option of rlsc train, got --optimizer"):
        run_compare(["--runs", str(tmp_path / "one"), str(tmp_path / "two"), "--optimizer.lr", "1"])
    with pytest.raises(ConfigError, match=r"^--config: expected the configuration file"):
        run_compare([])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["--objectives", "rlsc,nothing"],
            r"--objectives: expected different ones of rlsc, .*, got 'rlsc,nothing'",
        ),
        (["--objectives", "rlsc,rlsc"], "--objectives"),
        (["--objectives", "lower_temperature"], "--objectives: name one that trains"),
        (["--seeds", "0,x"], "--seeds: expected different whole numbers"),
        (["--seeds", "1,1"], "--seeds"),
        (["--temperature-factor", "2"], "--temperature-factor"),
        (
            ["--temperature-factor", "0.01"],
            "--temperature-factor: 0.01 asks lower_temperature for a temperature of 0.005",
        ),
        (["--optimizer.lr", "-1"], "optimizer.lr"),
        (["--optimzer.lr", "1"], "--optimzer.lr"),
        (["--evaluation.path", "None"], "evaluation.path"),
    ],
)
def test_bad_comparisons_are_refused_before_a_run(tmp_path: Path, arguments: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        run_compare(["--config", str(CONFIG), "--output", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("over", "named"),
    [
        (["algorithm.alpha"], "expected FIELD=VALUE"),
        (["algorithm.alpha=1,1"], "different values"),
        (["algorithm.alpha=0,"], "expected FIELD=VALUE"),
        (["algorithm.alpha=0,-1"], "algorithm.alpha"),
        (["algorithm.beta=0,1"], "algorithm.beta"),
        (["algorithm.alpha=0", "algorithm.alpha=1"], "swept already"),
        (["training.seed=0,1"], "use --seeds"),
        (["run_dir=a,b"], "set by the sweep"),
    ],
)
def test_bad_sweeps_are_refused_before_a_run(tmp_path: Path, over: list[str], named: Any) -> None:
    with pytest.raises(ConfigError, match=named):
        run_sweep(
            [
                "--config",
                str(CONFIG),
                "--output",
                str(tmp_path / "out"),
                *(text for axis in over for text in ("--over", axis)),
            ]
        )
    assert not (tmp_path / "out").exists()
