"""Where Megatron-Core names CUDA in what we run: recorded, and compared with a committed list, so that an
upgrade adds none unseen."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import make_model_folder, make_rollouts, tiny_config

LIST = Path(__file__).with_name("cuda_sites.txt")
OVERLAP = [
    "--parallel.overlap-grad-reduce",
    "True",
    "--parallel.overlap-param-gather",
    "True",
    "--parallel.bucket-size",
    "30000",
]
LAYOUTS = [
    (1, 1, []),
    (2, 2, ["--training.recompute", "full"]),
    (2, 1, OVERLAP),
    (1, 1, ["--model.dtype", "bfloat16"]),
]


def record(folder: str, run_dir: str, tp: int, flags: list[str]) -> set[str]:
    """Train, score, save and load on this rank; returns `kind file function` of every place that asked for
    CUDA."""
    from rlsc_mcore.data.packing import merge_identical, pack
    from rlsc_mcore.parallel import backend as ours
    from rlsc_mcore.parallel.groups import initialize_groups
    from rlsc_mcore.training.checkpoint import load_checkpoint
    from rlsc_mcore.training.step import Trainer
    from tests.helpers.checkpoints import save_checkpoint

    sites: set[str] = set()

    def note(kind: str) -> None:
        frame: types.FrameType | None = sys._getframe(2)
        while frame is not None:
            _, found, path = frame.f_code.co_filename.partition("/megatron/core/")
            if found:
                sites.add(f"{kind} {path} {frame.f_code.co_name}")
                return
            frame = frame.f_back

    backend = ours.get_backend()
    for name in ("current_device", "synchronize"):
        plain = getattr(torch.cuda, name)

        def noted(*args: Any, name: str = name, plain: Any = plain, **kwargs: Any) -> Any:
            note(name)
            return plain(*args, **kwargs)

        setattr(torch.cuda, name, noted)
    translate = ours._MegatronOnCpu.__torch_function__

    def recorded(self: Any, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            note("cuda()")
        if kwargs and kwargs.get("device") in ours._CUDA_SPELLINGS:
            note("device=cuda")
        result = translate(self, func, kinds, args, kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            note("type()")
        return result

    ours._MegatronOnCpu.__torch_function__ = recorded  # type: ignore[method-assign]
    groups = initialize_groups(backend, tp)
    trainer = Trainer(tiny_config(folder, ["--parallel.tp", str(tp), *flags]), Path(folder), backend, groups)
    rollouts = make_rollouts(num_questions=2, num_samples=3)
    sequences = merge_identical(
        rollouts, train_end_token=True, train_truncated=True, stop_token_ids=frozenset({0})
    )
    batches = pack(sequences[groups.dp_rank :: groups.dp_size], 64, multiple_of=trainer.token_multiple)
    for step in range(2):
        trainer.step(batches, step, len(rollouts))
        trainer.token_log_probs(batches[:1])
    checkpoint = save_checkpoint(Path(run_dir), trainer, 2, 2, "questions", 1)
    groups.barrier()
    load_checkpoint(checkpoint, trainer)
    trainer.step(batches, 2, len(rollouts))
    return sites


@pytest.mark.skipif(torch.cuda.is_available(), reason="only what runs without a GPU is translated and seen")
def test_megatron_names_cuda_where_it_is_known_to(tmp_path: Path) -> None:
    folder = str(make_model_folder(tmp_path / "model"))
    found: set[str] = set()
    for number, (world, tp, flags) in enumerate(LAYOUTS):
        for sites in run_ranks(world, record, folder, str(tmp_path / f"run{number}"), tp, flags):
            found |= sites
    assert len(found) > 5, "the recorder sees nothing"
    known = set(LIST.read_text(encoding="utf-8").splitlines())
    # After an upgrade of megatron-core: look at each new place, then make the file these lines.
    assert sorted(found) == sorted(known), f"new: {sorted(found - known)}, gone: {sorted(known - found)}"
