"""Count the effect of packing and balancing on several length distributions: `python -m
benchmarks.bench_packing`.

For each distribution, the rollouts of one step are merged, assigned to data-parallel ranks and packed with
the code of the training loop. Reported are:

- the share of padding among the computed tokens: packed (thd), in padded batches of neighbours in length, and
  in padded batches in the sampled order;
- the FLOPs of the busiest data-parallel rank over the mean, minus 1, if each rank trains its own samples and
  after the exchange;
- the share of sequences that move, the share of tokens that merging identical answers saves, and the number
  of passes over the fewest possible.

The results are counts, not times, and are the same on every machine. `--rollouts RUN` adds the rollouts of
your own run.
"""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.claims import PADDING_LIMIT
from benchmarks.harness import command_line, save
from benchmarks.plain_transformers import num_tokens
from rlsc_mcore.data.balance import assign, imbalance, loads
from rlsc_mcore.data.packing import merge_identical, pack
from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.planning.known_models import MODELS
from rlsc_mcore.types import Rollout

LENGTHS = Path(__file__).parent / "lengths"
NUM_SAMPLES = 16
BUDGET = 16384
Question = tuple[int, list[tuple[int, int]]]  # prompt tokens, (tokens, copies) per distinct answer


def main() -> None:
    """Measure every distribution and layout and write results/cpu/packing.json."""
    options = command_line(
        __doc__,
        rollouts=(Path, "folder of a run, whose sampled answers are measured too"),
        questions=(64, "questions per step"),
    )
    rows = []
    for name, questions in distributions(options.rollouts).items():
        step = [questions[i % len(questions)] for i in range(options.questions)]
        rows += [measure(name, step, tp, dp) for tp, dp in ((1, 2), (1, 8), (4, 8), (8, 8), (8, 32))]
    for row in rows:
        print(json.dumps(row))
    worst = max(row["filler_packed"] for row in rows)
    assert worst < PADDING_LIMIT, f"packing wastes {worst:.1%} of the tokens, more than {PADDING_LIMIT:.0%}"
    save(__file__, {"tokens_per_micro_batch": BUDGET, "rows": rows}, torch.device("cpu"), options.out)


def distributions(run: Path | None) -> dict[str, list[Question]]:
    """Return the questions of every distribution: the recorded lengths, and a synthetic one of long answers
    cut at 3072 tokens."""
    stream = random.Random(0)
    found: dict[str, list[Question]] = {}
    for file in sorted(LENGTHS.glob("*.json")):
        recorded = json.loads(file.read_text(encoding="utf-8"))["questions"]
        if isinstance(recorded[0][1][0], int):  # one reference solution each: draw lengths around it
            questions = [
                (prompt, [(scatter(stream, answer[0], 0.3), 1) for _ in range(NUM_SAMPLES)])
                for prompt, answer in recorded
            ]
        else:
            questions = [
                (prompt, [(length, copies) for length, copies in answers]) for prompt, answers in recorded
            ]
        found[file.stem] = stream.sample(questions, len(questions))
    long_answers = [
        (120, [(scatter(stream, centre, 0.4), 1) for _ in range(NUM_SAMPLES)]) for centre in centres(stream)
    ]
    found["synthetic_long_cut_at_3072"] = long_answers
    if run is not None:
        found[run.name] = recorded_rollouts(run)
    return found


def centres(stream: random.Random) -> list[float]:
    """Return typical answer lengths of 256 questions of mixed difficulty."""
    return [stream.lognormvariate(math.log(900), 0.7) for _ in range(256)]


def scatter(stream: random.Random, centre: float, sigma: float) -> int:
    """Draw the length of an answer from a log-normal distribution around its question's, at least 1 and at
    most 3072."""
    return min(3072, max(1, round(stream.lognormvariate(math.log(max(1.0, centre)), sigma))))


def recorded_rollouts(run: Path) -> list[Question]:
    """Read the lengths of a run's rollouts; prompts are not recorded and count as one token."""
    answers: dict[tuple[str, int], dict[tuple[int, ...], int]] = {}
    for file in sorted((run / "rollouts").glob("step_*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            counts = answers.setdefault((file.name, row["question"]), {})
            counts[tuple(row["response_ids"])] = counts.get(tuple(row["response_ids"]), 0) + 1
    return [(1, [(len(ids), count) for ids, count in counts.items()]) for counts in answers.values()]


def rollouts_of(questions: Sequence[Question]) -> list[Rollout]:
    """Make rollouts of these lengths; answers differ in their first token."""
    return [
        Rollout(
            question_index=index,
            sample_index=0,
            prompt_ids=(1,) * prompt,
            response_ids=(2 + distinct, *(1,) * (length - 1)),
            engine_log_probs=(0.0,) * length,
            finish_reason="stop",
            policy_version=0,
        )
        for index, (prompt, answers) in enumerate(questions)
        for distinct, (length, copies) in enumerate((max(1, length), copies) for length, copies in answers)
        for _ in range(copies)
    ]


def measure(name: str, questions: Sequence[Question], tp: int, dp: int) -> dict[str, Any]:
    """Assign, pack and count one step on tp x dp ranks."""
    shape: Architecture = MODELS["qwen2.5-math-7b"]
    cost = shape.cost_model()
    rollouts = rollouts_of(questions)
    sequences = merge_identical(
        rollouts, train_end_token=True, train_truncated=True, stop_token_ids=frozenset()
    )
    owners = [s.group % dp for s in sequences]
    lengths = [num_tokens(s) for s in sequences]
    costs = [cost.flops(length, sum(s.trained)) for s, length in zip(sequences, lengths, strict=True)]
    plan = assign(costs, owners, dp)
    real = sum(lengths)
    computed = passes = 0
    for rank in range(dp):
        batches = pack([s for s, r in zip(sequences, plan, strict=True) if r == rank], BUDGET, multiple_of=tp)
        computed += sum(len(batch.token_ids) for batch in batches)
        passes += len(batches)
    fewest = sum(
        -(-sum(x for x, r in zip(lengths, plan, strict=True) if r == rank) // BUDGET) for rank in range(dp)
    )
    return {
        "distribution": name,
        "tp": tp,
        "dp": dp,
        "rollouts": len(rollouts),
        "mean_tokens": round(real / len(sequences), 1),
        "filler_packed": round(1 - real / computed, 6),
        "filler_padded_by_length": round(padded(sorted(lengths)), 4),
        "filler_padded_as_sampled": round(padded(lengths), 4),
        "passes_over_fewest": round(passes / fewest, 3),
        "imbalance_sampled": round(imbalance(loads(costs, owners, dp)), 4),
        "imbalance_exchanged": round(imbalance(loads(costs, plan, dp)), 4),
        "moved_share": round(sum(a != b for a, b in zip(owners, plan, strict=True)) / len(plan), 4),
        "merged_share": round(1 - real / sum(num_tokens(s) * s.multiplicity for s in sequences), 4),
    }


def padded(lengths: Sequence[int]) -> float:
    """Return the share of padding if neighbours share padded batches of at most BUDGET tokens."""
    computed, longest, count = 0, 0, 0
    for length in lengths:
        if count and max(longest, length) * (count + 1) > BUDGET:
            computed += longest * count
            longest, count = 0, 0
        longest, count = max(longest, length), count + 1
    return 1 - sum(lengths) / (computed + longest * count)


if __name__ == "__main__":
    main()
