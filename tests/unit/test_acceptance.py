"""The table of claims: from files that the benchmarks really wrote (on a CPU), with a GPU's cases and numbers
put in."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.acceptance import MISSED, NOT_MEASURED, REACHED, claims_of, judge, table
from benchmarks.claims import CLAIMS, GIB, rows
from benchmarks.shapes import MEMORY_SHAPE, shapes

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "benchmarks" / "results" / "cpu"
CPU_SHAPE = "N=512 H=256 V=32768"
WHOLE, SHARD, HALF = shapes("cuda", full=False)
GRADIENTS = 2 * WHOLE.hidden_size * (WHOLE.num_tokens + WHOLE.num_columns)


def real(name: str) -> dict[str, Any]:
    """Return a committed result, as if its device had been a GPU."""
    content = json.loads((CPU / f"{name}.json").read_text())
    content["about"]["device"] = "NVIDIA H200"
    return content


def put(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write a result with the rows of its claims, as a benchmark does."""
    (folder / f"{name}.json").write_text(json.dumps({**content, "claims": rows(name, content)}))


def with_cases(name: str, cases: dict[str, dict[str, tuple[float, float, float | None]]]) -> dict[str, Any]:
    """Return a result whose rows are a real row each: case -> provider -> milliseconds, % of the ceiling,
    extra bytes."""
    content = real(name)
    template = next(row for row in content["rows"] if row["timing"])
    content["rows"] = [row for row in content["rows"] if not row["timing"]]
    for case, providers in cases.items():
        for provider, (milliseconds, percent, extra) in providers.items():
            row = copy.deepcopy(template)
            row.update(case=case, provider=provider, percent_of_ceiling=percent)
            row["timing"].update(median_ms=milliseconds, peak_extra_bytes=extra)
            content["rows"].append(row)
    return content


def outcomes(folder: Path, part: str) -> dict[str, tuple[str, str]]:
    """Return measured and outcome by claim."""
    return {
        line["claim"]: (line["measured"], line["outcome"]) for line in judge(folder) if line["part"] == part
    }


def test_nothing_is_claimed_without_results(tmp_path: Path) -> None:
    lines = judge(tmp_path)
    assert len(lines) == len(claims_of(tmp_path)) == 25 and {line["outcome"] for line in lines} == {
        NOT_MEASURED
    }
    assert f"0 {REACHED}, 0 {MISSED}, {len(lines)} {NOT_MEASURED}" in table(lines)


def test_results_of_a_cpu_are_no_gpu_s(tmp_path: Path) -> None:
    for file in CPU.glob("*.json"):
        put(tmp_path, file.stem, json.loads(file.read_text()))
    put(tmp_path, "end_to_end_1.5b", json.loads((CPU / "end_to_end_avx512.json").read_text()))
    lines = judge(tmp_path)
    assert {line["outcome"] for line in lines} == {NOT_MEASURED}
    assert any("log_prob.json is of x86_64" in line["measured"] for line in lines)
    assert any("end_to_end_1.5b.json is of x86_64" in line["measured"] for line in lines)


@pytest.mark.parametrize("file", sorted(CPU.glob("*.json")), ids=lambda file: file.stem)
def test_a_result_has_the_name_of_its_benchmark_and_its_claims(file: Path) -> None:
    content = json.loads(file.read_text())
    module = (
        str(content.get("about", {}).get("command", "")).removeprefix("python -m benchmarks.bench_").split()
    )
    if module and (ROOT / "benchmarks" / f"bench_{module[0]}.py").is_file():
        assert file.stem == module[0] or file.stem.startswith(f"{module[0]}_")
        assert content["claims"] == rows(file.stem, content)


def test_the_claims_that_need_no_gpu_hold() -> None:
    lines = judge(CPU)
    assert [line["outcome"] for line in lines] == [REACHED] * 2, lines


def test_shares_and_peers_of_the_kernels(tmp_path: Path) -> None:
    cases = {
        f"step {WHOLE.name}": {
            "ours auto (cuda)": (2.4, 97.0, 0.0),
            "ours triton": (1.0, 99.0, 0.0),
            "QuACK": (3.3, 71.0, 0.0),
        },
        f"step {SHARD.name}": {
            "ours auto (cuda)": (0.35, 84.0, 0.0),
            "QuACK": (0.34, 84.5, 0.0),
            "Liger": (0.9, 30.0, 0.0),
        },
        f"forward {WHOLE.name}": {"ours auto (cuda)": (1.2, 95.0, 0.0)},
    }
    put(tmp_path, "log_prob", with_cases("log_prob", cases))
    found = outcomes(tmp_path, "kernels")
    one_pass = "log p and weighted gradient, one pass, in place"
    assert found[f"{one_pass}, V = 152064: >= 93 %"] == (
        "97.0 % (ours auto (cuda))",
        REACHED,
    )  # ours as it is chosen, not a backend by name
    assert found[f"{one_pass}, V / 8 = 19008: >= 88 %"] == ("84.0 % (ours auto (cuda))", MISSED)
    assert found["log p alone, V = 152064: >= 95 %"] == ("95.0 % (ours auto (cuda))", REACHED)
    assert found["log p alone, V / 8 = 19008: >= 95 %"][1] == NOT_MEASURED
    assert found["every peer slower, V = 152064"] == ("1.38 x the fastest of 1", REACHED)
    assert found["every peer slower, V / 8 = 19008"] == ("0.97 x the fastest of 2", MISSED)
    line = next(line for line in judge(tmp_path) if line["claim"] == f"{one_pass}, V / 8 = 19008: >= 88 %")
    assert line["peer"] == "QuACK 84.5 %"


@pytest.mark.parametrize(("whole", "outcome"), [(30.0, REACHED), (13.9, MISSED), (None, REACHED)])
def test_memory_of_the_head(tmp_path: Path, whole: float | None, outcome: str) -> None:
    ours = {"ours": (80.0, 96.0, GRADIENTS + 1.25 * GIB), "whole logits": (81.0, 95.0, GRADIENTS + 6 * GIB)}
    big = {"ours": (240.0, 96.0, 6 * GIB)} | (
        {} if whole is None else {"whole logits": (243.0, 95.0, whole * GIB)}
    )
    content = with_cases("linear_log_prob", {WHOLE.name: ours, MEMORY_SHAPE.name: big})
    if whole is None:
        out_of_memory = {**content["rows"][0], "case": MEMORY_SHAPE.name, "provider": "whole logits"}
        content["rows"].append(
            {**out_of_memory, "timing": None, "skipped": "OutOfMemoryError: CUDA out of memory."}
        )
    put(tmp_path, "linear_log_prob", content)
    found = outcomes(tmp_path, "kernels")
    assert found["the same: at most 2.5 GiB beside inputs and gradients"] == ("1.25 GiB", REACHED)
    assert found["the same: every peer slower, the unweighted one too"] == (
        "1.01 x the fastest of 1",
        REACHED,
    )
    assert found["head and loss of 16 x 3072 tokens: >= 8 GiB below whole logits"][1] == outcome


def test_the_loop(tmp_path: Path) -> None:
    content = real("end_to_end_avx512")
    claims = [claim.text for claim in CLAIMS if claim.part == "loop"]
    put(tmp_path, "end_to_end_1.5b", content)
    rollout, share = content["rollout"]["ratio"], content["phases"]["share"]
    found = outcomes(tmp_path, "loop")
    assert found[claims[0]] == (f"{rollout:.1%}", REACHED if rollout >= 0.98 else MISSED)
    outside = 1 - share["rollout"] - share["train"]
    assert found[claims[1]] == (f"{outside:.2%}", REACHED if outside < 0.03 else MISSED)
    content["rollout"]["ratio"] = 0.99
    del content["phases"]
    put(tmp_path, "end_to_end_1.5b", content)
    found = outcomes(tmp_path, "loop")
    assert found[claims[0]] == ("99.0%", REACHED)
    assert found[claims[1]] == ("- (end_to_end_1.5b.json has no number phases.share.rollout)", NOT_MEASURED)


def test_the_whole_loop_at_7b(tmp_path: Path) -> None:
    content = real("end_to_end_avx512")
    content["phases"]["peak_device_bytes"] = 121.5 * GIB
    content["phases"]["median_seconds"]["whole_step"] = 24.04
    put(tmp_path, "end_to_end_7b", content)
    found = outcomes(tmp_path, "loop")
    assert found["7B, 8 x 16 x 1024: the whole loop on one GPU, peak below 130 GiB"] == (
        "121.5 GiB, 24.0 s per step",
        REACHED,
    )


@pytest.mark.parametrize(
    ("rise", "p_value", "outcome"), [(0.05, 0.001, REACHED), (0.05, 0.2, MISSED), (-0.05, 0.001, MISSED)]
)
def test_real_weights(tmp_path: Path, rise: float, p_value: float, outcome: str) -> None:
    content = json.loads((CPU / "comparison.json").read_text()) | {"about": {"device": "NVIDIA H200"}}
    content["rows"]["rlsc"]["confidence_f"]["change"].update(mean=rise, p_value=p_value)
    put(tmp_path, "real_model", content)
    measured, found = outcomes(tmp_path, "loop")[
        "SmolLM2-135M, 20 steps on GSM8K, 3 seeds: F rises (p < 0.05)"
    ]
    assert found == outcome and measured.startswith(
        f"F {rise:+.3f} (p = {p_value:.3f}), accuracy at T = 0.5 +"
    )


def test_a_question_is_trained_on_or_held_out(tmp_path: Path) -> None:
    """Whatever the order of the file, and about a quarter of them is held out."""
    from benchmarks.bench_real_model import split, write_questions
    from rlsc_mcore.data.questions import read_questions

    questions = read_questions("embedded:train")
    train, held_out = split(questions)
    assert sorted(q.index for q in [*train, *held_out]) == [q.index for q in questions]
    assert 0.2 < len(held_out) / len(questions) < 0.3
    assert {q.index for q in split(questions[::-1])[1]} == {q.index for q in held_out}
    read = read_questions(str(write_questions(tmp_path / "q.jsonl", held_out)))
    assert [(q.text, q.answer) for q in read] == [(q.text, q.answer) for q in held_out]


@pytest.mark.slow
def test_the_run_on_real_weights_runs_here_with_the_embedded_model(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    rows = [json.dumps({"question": f"What is {i} + 5?", "answer": str(i + 5)}) for i in range(40)]
    questions.write_text("\n".join(rows), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_real_model",
        "--model",
        "embedded:tiny_qwen2",
        "--questions",
        str(questions),
    ]
    command += [
        "--objectives",
        "rlsc,lower_temperature",
        "--seeds",
        "0",
        "--steps",
        "1",
        "--runs",
        str(tmp_path / "runs"),
    ]
    command += [
        "--out",
        str(tmp_path / "out"),
        "--held-out",
        "8",
        "--data.questions-per-step",
        "4",
        "--rollout.num-samples",
        "4",
    ]
    command += ["--rollout.max-new-tokens", "40", "--evaluation.num-samples", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out" / "real_model.json").read_text())
    assert list(result["rows"]) == ["base", "rlsc", "lower_temperature"] and result["split"]["evaluated"] <= 8
    assert (tmp_path / "out" / "real_model.svg").is_file()
    assert "confidence_f" in result["rows"]["rlsc"]


def test_the_readme_becomes_the_table_of_claims(tmp_path: Path) -> None:
    from benchmarks.readme import gpu_lines

    (nothing,) = gpu_lines(tmp_path / "h200")
    assert "Nothing has been measured on a GPU yet" in nothing
    put(tmp_path, "weight_swap_qwen2.5-7b", real("weight_swap_smollm2-135m"))
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.acceptance", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = gpu_lines(tmp_path)
    num_claims = len(claims_of(tmp_path))
    assert len(lines) == 2 + num_claims + 2 and lines[-1].count("`") >= 6 and "NVIDIA H200" in lines[-1]
    assert f"{num_claims - 6} {NOT_MEASURED}" in done.stdout


def test_training(tmp_path: Path) -> None:
    step = {
        "about": {"device": "NVIDIA H200"},
        "tokens_per_s": 10500.0,
        "memory": {"device_peak": int(131 * GIB)},
    }
    put(tmp_path, "train_step_qwen2.5-7b", {**step, "utilisation": {"mfu": 0.512}})
    put(tmp_path, "train_step_qwen2.5-1.5b", {**step, "utilisation": {"mfu": None}})
    found = list(outcomes(tmp_path, "train").values())
    assert found == [
        ("- (train_step_qwen2.5-1.5b.json has no number utilisation.mfu)", NOT_MEASURED),
        ("51.2%, 10500 tokens/s", REACHED),
        ("131.0 GiB", MISSED),
    ]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"rows": []}', '{"about": {"device": "NVIDIA H200"}, "rows": [{}]}']
)
def test_a_broken_file_is_not_measured(tmp_path: Path, text: str) -> None:
    for name in ("log_prob", "linear_log_prob", "end_to_end_1.5b", "train_step_qwen2.5-7b"):
        (tmp_path / f"{name}.json").write_text(text)
    assert {line["outcome"] for line in judge(tmp_path)} == {NOT_MEASURED}


def test_a_gpu_that_is_too_small_says_what_is_needed(tmp_path: Path) -> None:
    put(tmp_path, "train_step_qwen2.5-7b", {"skipped": "needs a GPU of 130 GiB, this one has 79 GiB"})
    measured = [line["measured"] for line in judge(tmp_path) if line["claim"].startswith("7B trains")]
    assert measured == ["- (train_step_qwen2.5-7b: needs a GPU of 130 GiB, this one has 79 GiB)"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_runs_on_a_cpu_with_tiny_shapes(tmp_path: Path) -> None:
    done = acceptance("--rehearse", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    written = {file.stem for file in tmp_path.glob("*.json")}
    expected = {
        "log_prob",
        "linear_log_prob",
        "sequence_sum",
        "weight_swap_tiny_qwen2",
        "train_step_tiny_qwen2",
    }
    assert written >= expected | {"end_to_end_1.5b", "end_to_end_7b", "acceptance"}
    lines = json.loads((tmp_path / "acceptance.json").read_text())["claims"]
    assert {line["outcome"] for line in lines} == {NOT_MEASURED}, (
        "a CPU's results support no claim about a GPU"
    )


def acceptance(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "benchmarks" / "gpu_acceptance.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)


def test_the_commands_are_those_of_real_benchmarks() -> None:
    done = acceptance("--dry-run")
    assert done.returncode == 0, done.stderr
    modules = {
        word for line in done.stdout.splitlines() for word in line.split() if word.startswith("benchmarks.")
    }
    assert modules >= {
        "benchmarks.bench_log_prob",
        "benchmarks.bench_weight_swap",
        "benchmarks.bench_train_step",
        "benchmarks.acceptance",
    }
    assert all((ROOT / f"{module.replace('.', '/')}.py").is_file() for module in modules)
    only = acceptance("--dry-run", "--only", "train").stdout.splitlines()
    assert only and all(line.startswith(("train ", "then: ", "=====")) for line in only)


def test_without_a_gpu_nothing_is_measured(tmp_path: Path) -> None:
    done = acceptance("--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "no GPU for" in done.stderr and not (tmp_path / "out").exists()
    assert (
        "--only: expected one of kernels swap train loop peers, got 'all'"
        in acceptance("--only", "all").stderr
    )


def test_a_random_model_is_a_model(tmp_path: Path) -> None:
    from benchmarks.random_model import make_model
    from rlsc_mcore.config import ModelConfig
    from rlsc_mcore.model.hf_checkpoint import check_vocabulary, check_weights, load_tokenizer
    from rlsc_mcore.model.shape import read_architecture

    folder = make_model("smollm2-135m", tmp_path / "model", layers=1)
    architecture = read_architecture(folder)
    assert architecture.num_layers == 1 and architecture.vocab_size == 49152
    check_weights(folder, architecture)
    check_vocabulary(load_tokenizer(folder, ModelConfig(path=str(folder))), architecture, folder)


def test_swap_claims(tmp_path: Path) -> None:
    content = real("weight_swap_smollm2-135m")
    ours, official = "shared storage, the rest rewritten (ours)", "reload_weights, Hugging Face names"
    content["transition_ms"]["whole"], content["ways"][ours]["ms"], content["verify_ms"]["checksums"] = (
        45.0,
        1.25,
        0.2,
    )
    content["ways"][official].update(ms=120.0, ratio=96.0)
    content["memory"]["saved_bytes"] = 14.4 * GIB
    put(tmp_path, "weight_swap_qwen2.5-7b", content)
    assert list(outcomes(tmp_path, "swap").values()) == [
        ("45.00 ms", REACHED), ("1.25 ms", MISSED), ("0.20 ms", REACHED), ("96 x", REACHED), ("2000 x", REACHED), ("14.4 GiB", REACHED),
    ]  # fmt: skip


def test_the_peer_must_have_sampled_with_vllm(tmp_path: Path) -> None:
    content = real("peers")
    put(tmp_path, "peers", content)
    assert next(iter(outcomes(tmp_path, "peers").values())) == (
        "- (TRL sampled with transformers generate)",
        NOT_MEASURED,
    )
    content.update(sampler_of_trl="colocated vLLM", ratio=1.75)
    put(tmp_path, "peers", content)
    assert next(iter(outcomes(tmp_path, "peers").values())) == ("1.75 x", REACHED)
