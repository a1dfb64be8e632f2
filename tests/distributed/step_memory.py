"""Measure the peak memory of a training step on a CPU: `python -m tests.distributed.step_memory FOLDER
SEQUENCES LENGTH FLAGS...`.

Prints JSON: bytes beyond what the process held before the trainer was built. The resident set is meaningful
only where malloc returns freed memory at once: the caller sets MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_
and MALLOC_ARENA_MAX.
"""

import json
import os
import sys
from pathlib import Path

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

import megatron.core.optimizer  # noqa: E402, F401
import torch  # noqa: E402

from rlsc_mcore.data.packing import pack  # noqa: E402
from rlsc_mcore.parallel.backend import get_backend  # noqa: E402
from rlsc_mcore.parallel.groups import initialize_groups  # noqa: E402
from rlsc_mcore.training.step import Trainer  # noqa: E402
from rlsc_mcore.types import Rollout, UniqueSequence  # noqa: E402
from tests.helpers.tiny import tiny_config  # noqa: E402


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def main() -> None:
    torch.set_num_threads(1)
    folder, count, length, flags = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    backend = get_backend()
    groups = initialize_groups(backend, 1)
    config = tiny_config(folder, ["--training.tokens-per-micro-batch", str(count * length), *flags])
    before = resident("VmRSS")
    trainer = Trainer(config, folder, backend, groups)
    vocabulary = trainer.policy.architecture.vocab_size
    answer = length - length // 4
    rollouts = [
        Rollout(
            i,
            0,
            (1,) * (length // 4),
            tuple((7 * j + i) % (vocabulary - 1) + 1 for j in range(answer)),
            (-1.0,) * answer,
            "stop",
            0,
        )
        for i in range(count)
    ]
    batches = pack(
        [UniqueSequence(rollout, i, 1, (True,) * answer) for i, rollout in enumerate(rollouts)],
        count * length,
    )
    trainer.step(batches, 0, count)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is that of the second step
    trainer.step(batches, 1, count)
    print(json.dumps({"peak": resident("VmHWM") - before, "tokens": count * length}))
    os._exit(0)


if __name__ == "__main__":
    main()
