"""Offline runs on the embedded model: they learn what the file says, resume bit for bit, and shard."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsc_mcore.config_file import load_config
from rlsc_mcore.data.questions import read_questions
from rlsc_mcore.data.templates import render_prompt
from rlsc_mcore.model.hf_checkpoint import resolve_model_folder
from rlsc_mcore.rollout.sampling import spread_samples
from rlsc_mcore.run.folder import REFERENCE_FILE
from tests.e2e.runs import EMBEDDED, assert_same_run, metrics, run_command, train, weights
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_config

FLAGS = [
    "--model.path", EMBEDDED, "--model.dtype", "float32", "--data.questions-per-step", "8",
    "--rollout.max-new-tokens", "40", "--rollout.max-num-seqs", "64", "--optimizer.lr", "1e-3",
    "--training.num-steps", "4", "--training.save-every", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve boxed answers, right and wrong, as pairs and with rewards."""
    folder = tmp_path_factory.mktemp("answers")
    pairs, rewards = [], []
    for question in read_questions("embedded:train")[:12]:
        right, wrong = f"The answer is \\boxed{{{question.answer}}}.", "I do not know."
        pairs.append({"prompt": question.text, "chosen": right, "rejected": wrong})
        rewards.append({"prompt": question.text, "response": right, "reward": 1.0})
        rewards.append({"prompt": question.text, "response": wrong, "reward": -0.5})
    found = {}
    for name, records in (("dpo", pairs), ("offline_rewards", rewards)):
        found[name] = folder / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return found


def flags(run_dir: Path, objective: str, files: dict[str, Path], *more: str) -> list[str]:
    data = ["--data.path", str(files[objective]), "--algorithm.objective", objective]
    return ["--run-dir", str(run_dir), *FLAGS, *data, *more]


def answer_log_probs(folder: Path, run_dir: Path) -> dict[tuple[int, int], float]:
    """log p at T = 1 of the answers of a run's last step, by transformers in float64: (question, answer)
    ->."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = Path(load_config(run_dir / "config.yaml").data.path).read_text(encoding="utf-8")
    pairs = [json.loads(line) for line in answers.splitlines()]
    found = {}
    for line in (run_dir / "rollouts" / "step_000003.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = render_prompt("chat", pairs[row["question"]]["prompt"], tokenizer)
        ids = torch.tensor([[*prompt, *row["response_ids"]]])
        with torch.no_grad():
            log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found[row["question"], row["sample"] % 2] = float(log_probs[len(prompt) - 1 :].sum())
    return found


def check_dpo_learnt(run_dir: Path) -> None:
    """The reference is the starting weights', and the margin of the trained pairs is positive."""
    before = answer_log_probs(resolve_model_folder(EMBEDDED), run_dir)
    after = answer_log_probs(run_dir / "export", run_dir)
    references = [json.loads(line) for line in (run_dir / REFERENCE_FILE).read_text().splitlines()]
    for (question, answer), value in before.items():
        assert sum(references[question][answer]) == pytest.approx(value, abs=1e-3)
    questions = {question for question, _ in before}
    margins = [after[q, 0] - before[q, 0] - (after[q, 1] - before[q, 1]) for q in questions]
    assert sum(margins) / len(margins) > 0.05


@pytest.mark.parametrize("objective", ["dpo", "offline_rewards"])
def test_a_run_learns_and_resumes_bit_for_bit(objective: str, files: dict[str, Path], tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ((code, _),) = run_ranks(1, train, [flags(whole, objective, files)])[0]
    assert code == 0
    rows = metrics(whole)
    assert all(row["log_prob_gap_mean"] is None and row["grad_norm"] > 0 for row in rows)
    if objective == "dpo":
        check_dpo_learnt(whole)
    ((code, _),) = run_ranks(1, train, [flags(stopped, objective, files)], ("train", 1))[0]
    assert code == 0
    ((code, _),) = run_ranks(1, train, [["--resume", str(stopped)]])[0]
    assert code == 0
    assert_same_run(stopped, whole)


def test_an_engine_is_built_only_for_an_evaluation(files: dict[str, Path], tmp_path: Path) -> None:
    """Without an evaluation nothing is sampled and no engine is built; the weights are the same bit for
    bit."""
    short = ["--training.num-steps", "2"]
    evaluated = [*short, "--evaluation.path", "embedded:test", "--evaluation.max-questions", "4"]
    alone, sampled = tmp_path / "alone", tmp_path / "sampled"
    ((code, printed),) = run_ranks(1, train, [flags(alone, "dpo", files, *short)])[0]
    assert code == 0 and any("engine: none" in line for line in printed)
    ((code, printed),) = run_ranks(1, train, [flags(sampled, "dpo", files, *evaluated)])[0]
    assert code == 0 and any("engine: vLLM" in line for line in printed)
    summaries = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in (alone, sampled)]
    assert [summary["engine_equals_export"] for summary in summaries] == [None, True]
    assert weights(alone / "export") == weights(sampled / "export")
    rows = [json.loads(line) for line in (alone / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["policy_version"] for row in rows] == [0, 1]
    for pools in (pools for row in rows for pools in row["memory"].values()):
        assert pools["kv_cache"] is None and pools["engine_weights"] is None


def test_a_run_without_its_reference_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_ranks(1, train, [flags(run_dir, "dpo", files, "--training.num-steps", "1")])
    (run_dir / REFERENCE_FILE).unlink()
    result = run_command("train", "--resume", run_dir, "--training.num-steps", "2")
    assert result.returncode == 2 and f"{REFERENCE_FILE}: no such file" in result.stderr + result.stdout


def two_steps(file: str, objective: str, layout: list[str], run_dir: str) -> list[tuple[float, float]]:
    """Take two steps of two updates without an engine; return the loss and gradient norm of every update."""
    from rlsc_mcore.data.packing import pack
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.inputs import read_inputs
    from rlsc_mcore.training.offline import open_offline
    from rlsc_mcore.training.redistribute import redistribute_step
    from rlsc_mcore.training.step import Trainer

    chosen = ["--data.path", file, "--algorithm.objective", objective, "--data.questions-per-step", "5"]
    smooth = ["--optimizer.eps", "1e-2", "--training.updates-per-rollout", "2", "--optimizer.lr", "1e-3"]
    config = tiny_config(EMBEDDED, [*chosen, *smooth, *layout], run_dir)
    backend = get_backend()
    inputs = read_inputs(config, backend)
    groups = initialize_groups(backend, config.parallel.tp, pp=config.parallel.pp)
    trainer = Trainer(config, inputs.model_folder, backend, groups)
    source = open_offline(inputs, trainer, groups, Path(run_dir), None)
    assert source is not None
    found = []
    for step in range(2):
        asked = inputs.sampler.step_questions(step)
        shares = spread_samples(
            len(asked), config.rollout.num_samples, groups.num_engines, groups.engine_index
        )
        positions, samples = [asked[place] for place, _ in shares], [share for _, share in shares]
        rollouts = source.rollouts(positions, samples, 0)
        exchange = redistribute_step(config, inputs, groups, step, rollouts)
        batches = pack(exchange.sequences, 256, multiple_of=trainer.token_multiple)
        outcome = trainer.step(batches, step, len(asked))
        found += [(update.loss, update.grad_norm) for update in outcome.updates]
    return found


@pytest.mark.parametrize(
    ("objective", "world", "layout"),
    [
        ("dpo", 2, []),
        ("dpo", 4, ["--parallel.tp=2"]),
        ("dpo", 2, ["--parallel.pp=2"]),
        ("offline_rewards", 2, []),
    ],
)
def test_several_ranks_equal_one(
    objective: str, world: int, layout: list[str], files: dict[str, Path], tmp_path: Path
) -> None:
    arguments = (str(files[objective]), objective)
    (alone,) = run_ranks(1, two_steps, *arguments, [], str(tmp_path))
    alone_reference = (tmp_path / REFERENCE_FILE).read_text()
    for rank in run_ranks(world, two_steps, *arguments, layout, str(tmp_path)):
        for found, expected in zip(rank, alone, strict=True):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    records = zip(
        alone_reference.splitlines(), (tmp_path / REFERENCE_FILE).read_text().splitlines(), strict=True
    )
    for left, right in records:
        for a, b in zip(json.loads(left), json.loads(right), strict=True):
            assert b == pytest.approx(a, abs=1e-4)
