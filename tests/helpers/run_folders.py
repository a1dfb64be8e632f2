"""Folders as a run leaves them, written by hand: for what reads runs."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlsc_mcore.config_file import dump_config, load_config
from rlsc_mcore.evaluation.records import AnswerRecord, QuestionRecord, write_records
from rlsc_mcore.observability.memory_pools import BORDERS, POOLS

CONFIG = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"


def make_answer(
    question: int, text: str, *, right: bool, temperature: float = 1.0, sample: int = 0, gold: str = "8"
) -> AnswerRecord:
    """One graded answer; its final answer is the gold one, or 7."""
    return AnswerRecord(
        question=question,
        temperature=temperature,
        sample=sample,
        gold=gold,
        text=text,
        extracted=gold if right else "7",
        strict=right,
        lenient=right,
        boxed=True,
        truncated=False,
        tokens=12,
        log_prob=-0.5 if temperature else None,
    )


def make_memory() -> dict[str, dict[str, int | None]]:
    """A step's table on a GPU of 140 GiB: the KV cache gives way to activations, which are gone before it
    comes back."""
    held = {
        "weights": 15,
        "gradients": 8,
        "optimizer": 12,
        "engine_weights": 1,
        "cuda_graphs": 1,
        "workspace": 1,
        "other": 2,
    }
    pools: dict[str, dict[str, int | None]] = {}
    for border in BORDERS:
        sizes = held | {
            "kv_cache": 40 if border in ("rollout", "swap") else 0,
            "activations_cached": 30 if border == "train" else 0,
        }
        pools[border] = {pool: sizes.get(pool, 140 - sum(sizes.values())) << 30 for pool in POOLS}
    return pools


def make_metrics(step: int, **changes: Any) -> dict[str, Any]:
    """A row of metrics.jsonl."""
    row = {
        "step": step,
        "policy_version": step,
        "loss": 0.4 - 0.01 * step,
        "f_estimate": 0.4 + 0.01 * step,
        "log_p_old": {"min": -9.0, "q10": -3.0, "q50": -0.5, "q90": -0.3, "max": -0.1},
        "alpha_share": 0.2,
        "effective_samples": 800.0,
        "truncated_weight_share": 0.0,
        "mean_length": 27.0 + step % 3,
        "truncated_share": 0.0,
        "distinct_share": 0.3,
        "boxed_share": 0.7,
        "log_prob_gap_mean": 1e-7,
        "log_prob_gap_p99": 2e-6,
        "log_prob_gap_max": 3e-6 + 1e-7 * step,
        "log_prob_gap_sequence_mean": 1e-6,
        "log_prob_gap_sequence_max": 4e-6,
        "grad_norm": 4.0,
        "lr": 1e-4,
        "seconds": {"rollout": 2.0, "pack": 0.01, "train": 2.5, "swap": 0.001},
        "rollout_tokens_per_s": 11000.0,
        "train_tokens_per_s": 7000.0,
        "memory_bytes": {"host_resident": 2 << 30},
        "memory": make_memory(),
        "warnings": [],
    }
    return row | changes


def write_run(
    folder: Path,
    *,
    before: Sequence[AnswerRecord] = (),
    after: Sequence[AnswerRecord] = (),
    questions: Sequence[QuestionRecord] = (),
    metrics: Sequence[dict[str, Any]] = (),
    rollouts: Sequence[dict[str, Any]] = (),
    flags: Sequence[str] = (),
) -> Path:
    """Write what a run of the embedded model's configuration would have written."""
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(CONFIG, ["--run-dir", str(folder), *flags])
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in metrics), encoding="utf-8"
    )
    for name, answers in (("before", before), ("after", after)):
        if answers:
            write_records(
                folder / "evaluation",
                name,
                {"scores": {}, "answers": list(answers), "questions": list(questions)},
            )
    if rollouts:
        (folder / "rollouts").mkdir()
        (folder / "rollouts" / "step_000000.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rollouts), encoding="utf-8"
        )
    return folder
