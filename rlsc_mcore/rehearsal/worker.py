"""Run a rehearsal in its own process: `python -m rlsc_mcore.rehearsal.worker LIBRARY JOB`.

Both arguments are paths; the process prints one JSON object. It loads the library of fake_cuda.cpp before
torch, because torch looks for the guard and hooks of a device when it is imported.
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Rehearse the job in a JSON file and print the result as JSON.

    Keys: `flags`, `folder` (of config.json), `rank`, `world_size`, `lengths`, `steps`, `gpu_bytes`.
    """
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # run Megatron's fused functions without compilation
    ctypes.CDLL(sys.argv[1])
    job = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    print(json.dumps(rehearse(job)))


def rehearse(job: dict[str, Any]) -> dict[str, Any]:
    """Build the trainer of one rank and run its steps on fake tensors.

    Returns `built` (bytes after construction), `saved` (bytes of a checkpoint) and, per step, bytes, reads,
    device-to-host copies and collectives.
    """
    from rlsc_mcore.rehearsal import fake_gpu, fused_adam

    fake_gpu.pretend(job["rank"], job["world_size"], job["gpu_bytes"])
    fake_gpu.accommodate_megatron()
    from rlsc_mcore.config_file import parse_config
    from rlsc_mcore.data.packing import pack
    from rlsc_mcore.parallel.backend import get_backend
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.step import Trainer

    config, folder = parse_config(job["flags"]), Path(job["folder"])
    if config.optimizer.precision_aware or config.optimizer.cpu_offload:
        fused_adam.install()
    backend = get_backend()
    groups = initialize_groups(backend, config.parallel.tp, pp=config.parallel.pp)
    steps = []
    with fake_gpu.fake_tensors() as recorder:
        trainer = Trainer(config, folder, backend, groups, load=False)
        built = recorder.live["cuda"]
        for step in range(job["steps"]):
            trainer.release_memory()
            released = recorder.live["cuda"]
            recorder.restart()
            sequences = [_sequence(number, length) for number, length in enumerate(job["lengths"])]
            batches = pack(
                sequences, config.training.tokens_per_micro_batch, multiple_of=trainer.token_multiple
            )
            fake_gpu.expect_hidden_states(
                [len(batch.token_ids) // groups.tp_size for batch in batches],
                trainer.policy.architecture.hidden_size,
            )
            outcome = trainer.step(batches, step, len(sequences) * groups.dp_size)
            steps.append(
                {
                    "updated": outcome.updated,
                    "micro_batches": [len(batch.token_ids) for batch in batches],
                    "released": released,
                    "peak": recorder.peak["cuda"],
                    "after": recorder.live["cuda"],
                    "reads": dict(recorder.reads),
                    "copies_to_host": dict(recorder.copies_to_host),
                    "collectives": dict(recorder.collectives),
                }
            )
        saved = _saved_bytes(trainer)
    return {"built": built, "steps": steps, "saved": saved}


def _saved_bytes(trainer: Any) -> int:
    """Return the number of bytes that this rank writes to a checkpoint."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica

    from rlsc_mcore.training.checkpoint import sharded_state

    tensors = [
        value
        for value in nested_values(sharded_state(trainer, is_loading=False))
        if isinstance(value, ShardedTensor)
    ]
    return sum(tensor.data.nbytes for tensor in tensors if is_main_replica(tensor.replica_id))


def _sequence(number: int, length: int) -> Any:
    """Return a sequence of `length` tokens; the first min(16, length // 2) are the prompt."""
    from rlsc_mcore.types import Rollout, UniqueSequence

    prompt = min(16, length // 2)
    answer = length - prompt
    rollout = Rollout(0, number, (1,) * prompt, (1,) * answer, (0.0,) * answer, "stop", 0)
    return UniqueSequence(rollout, number % 2, 1, (True,) * answer)


if __name__ == "__main__":
    main()
