"""The paper's experiment: its chain of commands, what it says is missing, and its table from evaluations
written by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlsc_mcore.config import TEMPLATES, ConfigError
from rlsc_mcore.config_file import load_config
from rlsc_mcore.evaluation.records import QuestionRecord, write_records
from rlsc_mcore.experiments.paper import ARMS, PAPER, PROTOCOLS, SHOWN_COLUMNS
from rlsc_mcore.experiments.table2 import SIZES, Extent, chain, main
from tests.helpers.run_folders import make_answer

SCRIPT = Path(__file__).parents[2] / "launch" / "reproduce_table2.sh"


def test_the_papers_numbers() -> None:
    # The row sums of the published table, added up by hand.
    sums = {
        size: {row: round(sum(values.values()), 1) for row, values in rows.items()}
        for size, rows in PAPER.items()
    }
    assert sums == {"1.5b": {"base": 233.7, "rlsc": 310.3}, "7b": {"base": 293.5, "rlsc": 390.3}}
    assert PAPER["7b"]["rlsc"]["gpqa_diamond"] == 24.1 and PAPER["1.5b"]["base"]["math500"] == 35.6


def test_another_benchmark_changes_no_number_of_the_paper() -> None:
    code = (
        "from rlsc_mcore.evaluation import benchmarks as b; b.BENCHMARKS['ninth'] = b.BENCHMARKS['gsm8k']\n"
        "from rlsc_mcore.experiments.paper import PAPER; print(len(PAPER['7b']['rlsc']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["8"]


def test_the_columns_are_multiples_of_what_their_protocol_counts() -> None:
    """AMC23: the mean of 8 answers to 40 questions; one answer to 30 questions of AIME24; 3 answers to 198 of
    GPQA."""
    for values in (row for rows in PAPER.values() for row in rows.values()):
        for column, count in (
            ("amc23", 320),
            ("aime24", 30),
            ("math500", 500),
            ("minerva", 272),
            ("gsm8k", 1319),
            ("olympiad", 675),
        ):
            nearest = 100 * round(values[column] * count / 100) / count
            assert round(nearest, 1) == pytest.approx(values[column], abs=0.051), column


def test_every_column_of_the_paper_has_a_protocol() -> None:
    asked = [benchmark for protocol in PROTOCOLS if protocol.column for benchmark in protocol.benchmarks]
    assert sorted(asked) == sorted(SHOWN_COLUMNS)
    by_name = {protocol.name: protocol for protocol in PROTOCOLS}
    assert by_name["one_answer"].options == ("--temperatures",)
    assert by_name["amc23"].options == ("--k", "8", "--temperatures", "0.7")
    assert by_name["mmlu_stem"].options == ("--temperatures", "--few-shot", "5")
    assert (by_name["gpqa_diamond"].num_samples, by_name["gpqa_diamond"].temperature) == (3, 0.7)
    assert by_name["gpqa_diamond"].template == "chat" and by_name["pass_at_k"].num_samples == 64


def test_the_chain_can_run_in_its_order(tmp_path: Path) -> None:
    extent = Extent(steps=(10, 20, 40))
    tasks = chain(
        [SIZES["1.5b"], SIZES["7b"]], tmp_path, tmp_path / "data", extent, ["--optimizer.lr", "2e-5"]
    )
    names = [task.name for task in tasks]
    base, trained = len(PROTOCOLS), sum(not protocol.base_only for protocol in PROTOCOLS)
    assert len(set(names)) == len(names) == 2 * (base + len(ARMS) * 3 * (1 + 3 * trained)) + 1
    for position, task in enumerate(tasks):
        assert set(task.after) <= set(names[:position])
    by_name = {task.name: task.arguments for task in tasks}
    assert (
        ",".join(TEMPLATES) in by_name["7b.base.one_answer"]
        and "qwen25-math" in by_name["7b.rlsc.seed2.step40.one_answer"]
    )
    assert "chat" in by_name["7b.rlsc.seed2.step10.gpqa_diamond"]
    train = by_name["1.5b.self_sft_log_p_at_1.seed1.train"]
    config = load_config(SIZES["1.5b"].config, train[2:])
    assert (config.training.num_steps, config.training.save_every, config.training.seed) == (40, 10, 1)
    assert (config.algorithm.objective, config.algorithm.log_prob_temperature, config.optimizer.lr) == (
        "self_sft",
        "1.0",
        2e-5,
    )
    assert config.training.keep_last >= 4 and config.data.path == str(tmp_path / "data" / "aime24.jsonl")
    evaluation = by_name["1.5b.rlsc.seed0.step20.amc23"]
    assert evaluation[:4] == ("--model", str(tmp_path / "1.5b" / "runs" / "rlsc_seed0"), "--checkpoint", "20")
    assert str(tmp_path / "1.5b" / "rlsc" / "seed0" / "step20" / "amc23") in evaluation
    assert str(tmp_path / "1.5b" / "base" / "temperature_0p25") in by_name["1.5b.base.temperature_0p25"]
    outputs = [
        Path(task.arguments[task.arguments.index("--output") + 1]) for task in tasks if task.kind == "eval"
    ]
    assert len(set(outputs)) == len(outputs) and not any(
        output.suffix for output in outputs
    )  # folders, as rlsc eval has it
    assert all(task.arguments[-2:] == ("--optimizer.lr", "2e-5") for task in tasks if task.kind != "table")
    assert set(tasks[-1].after) == {task.name for task in tasks if task.kind == "eval"}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_configuration(arm: str) -> None:
    load_config(SIZES["7b"].config, list(ARMS[arm]))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--sizes", "70b"], "--sizes: expected different ones of 1.5b"),
        (["--sizes", "tiny", "--arms", "rlsc,grpo"], "--arms: expected different ones of rlsc"),
        (["--sizes", "tiny", "--seeds", "1,1"], "--seeds"),
        (["--sizes", "tiny", "--steps", "0,10"], "--steps: expected different whole numbers like 10,20,40"),
    ],
)
def test_bad_extents_are_refused(flags: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        main(["plan", *flags])


def test_everything_missing_is_named_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"^10 things are missing; nothing was started$"):
        main(["plan", "--sizes", "7b", "--output", str(tmp_path / "out"), "--benchmark-dir", str(tmp_path)])
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("missing: ") == 10
    assert (
        "bring olympiad.jsonl" in printed.err
        and "missing: 7b: model.path: Qwen/Qwen2.5-Math-7B" in printed.err
    )
    assert not (tmp_path / "out").exists()


def test_the_table_stands_beside_the_papers(tmp_path: Path) -> None:
    questions = [QuestionRecord(i, "q", "8", "q") for i in range(10)]

    def write(row: str, protocol: str, name: str, right: int, temperature: float = 0.0, k: int = 1) -> None:
        answers = [
            make_answer(i, f"{s}", right=i < right and s < max(1, k // 2), temperature=temperature)
            for i in range(10)
            for s in range(k)
        ]
        write_records(
            tmp_path / "7b" / row / protocol, name, {"scores": {}, "answers": answers, "questions": questions}
        )

    write("base", "one_answer", "aime24.none", 2)
    write("base", "one_answer", "aime24.qwen25-math", 0)
    write("base", "amc23", "amc23.qwen25-math", 4, 0.7, 8)
    for seed, right in enumerate((3, 5, 4)):
        write(f"rlsc/seed{seed}/step10", "one_answer", "aime24.qwen25-math", right)
        write(f"rlsc/seed{seed}/step10", "amc23", "amc23.qwen25-math", 8, 0.7, 8)
        write(f"rlsc/seed{seed}/step10", "pass_at_k", "aime24.qwen25-math", 5, 0.5, 4)
    assert main(["table", str(tmp_path)]) == 0
    table = json.loads((tmp_path / "table2.json").read_text(encoding="utf-8"))["7b"]
    rows = table["rows"]
    assert {name: row["aime24"]["strict"]["mean"] for name, row in rows.items()} == {
        "base, none": 20.0,
        "base, qwen25-math": 0.0,
        "rlsc, 10 steps": pytest.approx(40.0),
    }
    zero = rows["base, qwen25-math"]["aime24"]["strict"]
    assert zero["low"] == 0 and zero["high"] == pytest.approx(27.75, abs=0.01)  # Wilson's interval of 0 of 10
    assert rows["base, qwen25-math"]["amc23"]["strict"]["mean"] == pytest.approx(
        20.0
    )  # half of the answers to 4 of 10
    assert rows["rlsc, 10 steps"]["aime24"]["strict"]["seeds"] == 3
    change = table["changes"]["rlsc, 10 steps"]
    assert change["aime24"]["mean"] == pytest.approx(40.0) and change["aime24"]["seeds"] == 3
    assert change["aime24"]["low"] < 40 < change["aime24"]["high"]
    assert all(cell["corrected_p_value"] >= cell["p_value"] for cell in change.values())
    # Two of four answers to 5 of 10 questions are right: pass@1 is 1/4, pass@2 is 5/12, pass@4 is 1/2.
    found = {key: cell["mean"] for key, cell in table["pass_at_k"]["rlsc, 10 steps"].items()}
    assert found == {
        f"aime24, k = {k}": pytest.approx(value) for k, value in ((1, 25.0), (2, 50 * 5 / 6), (4, 50.0))
    }
    text = (tmp_path / "table2.md").read_text(encoding="utf-8")
    assert "| paper, rlsc | 26.7 | – | 72.6 |" in text and "| base, none | 20.0 (" in text
    assert "| aime24 † |" in text and "amc23: mean of 8 answers at T = 0.7" in text
    lenient = rows["base, none"]["aime24"]["lenient"]["mean"]
    assert f" / {lenient:.1f} (" in text


def test_an_empty_folder_has_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no evaluations there"):
        main(["table", str(tmp_path)])


def run_script(*arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "PATH": path}
    return subprocess.run(
        ["/bin/bash", str(SCRIPT), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_the_script_prints_the_chain(tmp_path: Path) -> None:
    done = run_script(
        "--dry-run",
        "--sizes",
        "tiny",
        "--output",
        str(tmp_path / "out"),
        "--seeds",
        "0",
        "--steps",
        "1,2",
        "--arms",
        "rlsc",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(" ")[0] for line in lines][:3] == [
        "tiny.base.one_answer",
        "tiny.base.mean_of_2",
        "tiny.base.pass_at_k",
    ]
    assert lines[-1].startswith("table (after tiny.base.one_answer,") and not (tmp_path / "out").exists()


def test_the_script_needs_slurm_or_says_so(tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    done = run_script("--sizes", "tiny", path=str(tmp_path))
    assert done.returncode == 2 and "no sbatch on this machine" in done.stderr
