"""The layouts and options whose training steps are rehearsed, and the collectives that their steps use.

`python -m tests.rehearsal.cases` rehearses all cases and writes collectives.json. Read its difference before
committing it: each line is a count of one collective on one group in one step.
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlsc_mcore.config import LoraConfig
from rlsc_mcore.rehearsal.run import run_rank
from tests.rehearsal.shapes import model_folder

COLLECTIVES = Path(__file__).with_name("collectives.json")
LAYERS = 4
LENGTHS = (1500,) * 8
MICRO_BATCH = ["--training.tokens-per-micro-batch", "4096"]
GROUP_SOFTMAX = ["--algorithm.confidence", "group_softmax", "--training.updates-per-rollout", "2"]


@dataclass(frozen=True)
class Case:
    """A model cut to LAYERS layers on tp x pp x dp GPUs, the options of the run and those of the plan."""

    model: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    flags: tuple[str, ...] = ()
    planned: dict[str, Any] = field(default_factory=dict)
    rank: int = 0

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def stage(self) -> int:
        return self.rank // (self.tp * self.dp)


def _last_stage(case: Case) -> Case:
    return Case(**{**vars(case), "rank": case.world_size - 1})


_PIPELINE = Case("qwen2.5-7b", tp=4, pp=2, dp=2, flags=(*MICRO_BATCH,))
_PIPELINE_72B = Case(
    "qwen2.5-72b",
    tp=8,
    pp=2,
    dp=2,
    flags=("--training.recompute", "full", "--optimizer.offload-during-rollout", "True", *GROUP_SOFTMAX),
    planned={"offload_during_rollout": True},
)
CASES = {
    "plain": Case("qwen2.5-1.5b"),
    "overlap": Case(
        "qwen2.5-7b",
        tp=4,
        dp=2,
        flags=("--parallel.overlap-grad-reduce", "True", "--parallel.overlap-param-gather", "True"),
    ),
    "full recompute": Case("qwen2.5-72b", tp=8, dp=4, flags=("--training.recompute", "full")),
    "precision aware": Case(
        "qwen2.5-7b",
        tp=4,
        dp=2,
        flags=("--optimizer.precision-aware", "True"),
        planned={"precision_aware": True},
    ),
    "cpu offload": Case(
        "qwen2.5-1.5b", flags=("--optimizer.cpu-offload", "1.0"), planned={"cpu_offload": 1.0}
    ),
    "offload in rollouts": Case(
        "qwen2.5-1.5b",
        flags=("--optimizer.offload-during-rollout", "True"),
        planned={"offload_during_rollout": True},
    ),
    "bfloat16 gradients": Case(
        "qwen2.5-1.5b",
        dp=2,
        flags=("--optimizer.grad-dtype", "bfloat16", "--training.recompute", "selective"),
        planned={"grad_dtype": "bfloat16"},
    ),
    "entropy": Case("qwen2.5-7b", tp=4, dp=2, flags=("--algorithm.objective", "entropy")),
    "group softmax, two updates": Case("qwen2.5-1.5b", dp=2, flags=(*GROUP_SOFTMAX,)),
    "LoRA": Case(
        "qwen2.5-7b",
        tp=2,
        dp=2,
        flags=("--lora.rank", "16", "--training.recompute", "full"),
        planned={"lora": LoraConfig(rank=16)},
    ),
    "pipeline, first stage": _PIPELINE,
    "pipeline, last stage": _last_stage(_PIPELINE),
    "pipeline with all options, first stage": _PIPELINE_72B,
    "pipeline with all options, last stage": _last_stage(_PIPELINE_72B),
}


def rehearse(
    folder: Path, case: Case, *flags: str, lengths: tuple[int, ...] = LENGTHS, steps: int = 2
) -> dict[str, Any]:
    """Rehearse `steps` steps of a case in a process of its own; return the record of the worker."""
    model, _ = model_folder(folder / case.model, case.model, LAYERS)
    base = ["--run-dir", "unused", "--model.path", str(model), "--data.path", "embedded:train"]
    layout = ["--parallel.tp", str(case.tp), "--parallel.pp", str(case.pp)]
    return run_rank(
        [*base, *layout, *case.flags, *flags],
        model,
        rank=case.rank,
        world_size=case.world_size,
        lengths=lengths,
        steps=steps,
        timeout_s=280,
    )


def main() -> None:
    """Rehearse two steps of each case and write the collectives of the second.

    The first one may also gather the initial parameters.
    """
    table = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, case in CASES.items():
            *_, step = rehearse(Path(scratch), case)["steps"]
            table[name] = dict(sorted(step["collectives"].items()))
            print(name, table[name], flush=True)
    COLLECTIVES.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
