"""Measure the training step of every objective relative to `rlsc`: `python -m benchmarks.bench_objectives`.

One model, one set of sequences, one process; the objectives take their steps in turn, round after round. An
objective costs its passes: a pass that trains is one forward and one backward, and objectives that need their
question's samples, a reference or a teacher score sequences without gradients first. `scored_tokens` counts
these tokens in units of the trained ones. A teacher's prompt is as long as the student's here, and
self-distillation distils one of two samples. Sampling and grading are not part of the measured step. On a CPU
the processor time counts. Before anything is timed, each objective must change the weights and give a finite
loss. `ratio` is a step's time over that of `rlsc`; quote only the ratios.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

from benchmarks.harness import Task, command_line, leave, measure, process_clock, save  # noqa: E402
from rlsc_mcore.config_file import parse_config  # noqa: E402
from rlsc_mcore.data.packing import pack  # noqa: E402
from rlsc_mcore.model.build import PolicyModel  # noqa: E402
from rlsc_mcore.model.hf_checkpoint import resolve_model_folder  # noqa: E402
from rlsc_mcore.objectives import OBJECTIVES, Objective  # noqa: E402
from rlsc_mcore.parallel.backend import get_backend  # noqa: E402
from rlsc_mcore.parallel.groups import initialize_groups  # noqa: E402
from rlsc_mcore.training.starting_weights import StartingWeights  # noqa: E402
from rlsc_mcore.training.step import Trainer  # noqa: E402
from rlsc_mcore.training.teaching import Teacher  # noqa: E402
from rlsc_mcore.types import PackedBatch, Rollout, UniqueSequence  # noqa: E402

REFERENCE = "rlsc"


def make_batches(
    options: argparse.Namespace, vocab_size: int, multiple_of: int, row: Objective
) -> list[PackedBatch]:
    """Return packed random answers, two per question, with advantages 1 and -1.

    Answers that a teacher sees have a teacher's prompt: the first of a question for self-distillation, all of
    them, with advantage 1, for an objective with a careless prompt.
    """
    stream = random.Random(0)
    sequences = []
    for number in range(options.sequences):
        length = options.sequence_length - options.prompt_tokens
        prompt = tuple(stream.randrange(1, vocab_size) for _ in range(options.prompt_tokens))
        answer = tuple(stream.randrange(1, vocab_size) for _ in range(length))
        rollout = Rollout(number // 2, number % 2, prompt, answer, (-5.0,) * length, "stop", 0)
        advantage = 1.0 if row.needs_careless or number % 2 == 0 else -1.0
        taught = prompt[::-1] if row.needs_careless or row.distills else ()
        sequences.append(UniqueSequence(rollout, number // 2, 1, (True,) * length, advantage, taught))
    return pack(sequences, options.tokens_per_micro_batch, multiple_of=multiple_of)


def main() -> None:
    """Measure all objectives and write results/<device>/objectives.json."""
    options = command_line(
        __doc__,
        model=("embedded:tiny_qwen2", "a model folder or embedded:tiny_qwen2"),
        sequences=(64, "answers of a step, two per question"),
        sequence_length=(96, "tokens of prompt and answer"),
        prompt_tokens=(32, "tokens of the prompt"),
        tokens_per_micro_batch=(4096, "as in rlsc train"),
        seconds=(60.0, "time for all rounds"),
    )
    backend = get_backend()
    groups = initialize_groups(backend, 1)
    required = ["--run-dir", "unused", "--model.path", options.model, "--data.path", "embedded:train"]
    configs = {
        name: parse_config([*required, "--model.dtype", "float32", "--optimizer.lr", "1e-9", *row.flags])
        for name, row in OBJECTIVES.items()
    }
    trainer = Trainer(configs[REFERENCE], resolve_model_folder(options.model), backend, groups)
    teacher, start = Teacher(trainer.policy, keeps_start=False), StartingWeights(trainer.policy)
    vocab_size, multiple = trainer.policy.architecture.vocab_size, trainer.token_multiple
    batches = {name: make_batches(options, vocab_size, multiple, OBJECTIVES[name]) for name in configs}

    num_tokens = sum(len(batch.token_ids) for batch in batches[REFERENCE])

    def step(name: str) -> Any:
        trainer.config = configs[name]
        trainer.teacher = teacher if OBJECTIVES[name].distills else None
        trainer.start = start if configs[name].compares_with_start else None
        return trainer.step(batches[name], 0, options.sequences)

    rows = {name: {"scored_tokens": check(name, trainer, step, num_tokens)} for name in configs}
    tasks = {name: Task(lambda name=name: step(name)) for name in configs}
    tasks["scoring"] = Task(lambda: trainer.token_log_probs(batches[REFERENCE]))
    clock, _ = process_clock(backend.device)
    timings = measure(tasks, backend.device, options.seconds, clock=clock)
    ratios = {name: timing.median_ms / timings[REFERENCE].median_ms for name, timing in timings.items()}
    for name, row in rows.items():
        row["ratio"] = ratios[name]
        row["expected_ratio"] = 1.0 + row["scored_tokens"] * ratios["scoring"]
        row["rounds"] = timings[name].rounds
    result = {
        "model": options.model,
        "tokens_per_step": num_tokens,
        "scoring": {"ratio": ratios["scoring"]},
        "objectives": rows,
    }
    print(json.dumps(result, indent=1))
    save(__file__, result, backend.device, options.out)
    leave()


def check(name: str, trainer: Trainer, step: Callable[[str], Any], num_tokens: int) -> float:
    """Take a step and return the tokens that it scores without gradient, in units of `num_tokens`.

    Ends the program if the step has no finite loss or changes nothing.
    """
    passed: list[int] = []
    with counted(trainer.policy.model, passed):
        outcome = step(name)
    if not (math.isfinite(outcome.loss) and outcome.grad_norm > 0 and outcome.updated):
        raise SystemExit(f"{name}: loss {outcome.loss}, gradient norm {outcome.grad_norm}")
    return sum(passed) / num_tokens


@contextmanager
def counted(model: PolicyModel, passed: list[int]) -> Iterator[None]:
    """Inside the block, append the number of tokens of each pass without gradient to `passed`."""
    score = model.score

    def scored(batch: PackedBatch, head: Any) -> Any:
        passed.append(len(batch.token_ids))
        return score(batch, head)

    model.score = scored
    try:
        yield
    finally:
        del model.score


if __name__ == "__main__":
    main()
