"""List the parallel layouts of a model on given GPUs, which of them fit, and their estimated speed."""

from dataclasses import dataclass, replace

from rlsc_mcore.model.shape import Architecture
from rlsc_mcore.planning.memory import Layout, kv_bytes_per_token, rollout_bytes, train_bytes
from rlsc_mcore.planning.timing import Gpu, Work, seconds

USABLE_SHARE = 0.94  # usable fraction of a GPU's memory; the rest is lost to fragmentation
FEWEST_LONGEST = 8  # number of sequences of maximum length that the KV cache must hold


@dataclass(frozen=True)
class Candidate:
    """One layout with its memory in bytes by part and its seconds by phase; `why_not` is empty if it fits."""

    layout: Layout
    training: dict[str, int]
    rollout: dict[str, int]
    seconds: dict[str, float]
    why_not: str

    @property
    def step_seconds(self) -> float:
        return sum(seconds for phase, seconds in self.seconds.items() if not phase.startswith("of it"))

    @property
    def peak_bytes(self) -> int:
        return max(sum(self.training.values()), sum(self.rollout.values()))


def candidates(
    shape: Architecture,
    base: Layout,
    work: Work,
    gpu: Gpu,
    *,
    num_gpus: int,
    gpu_bytes: int,
    gpus_per_node: int,
    pp: int | None = None,
    searches_offload: bool = True,
) -> list[Candidate]:
    """Return the best layout for each tensor-parallel size and recompute mode.

    Layouts that fit come first, the fastest first; the others follow in order of memory. The search covers
    engine sizes (unless `base.engine_tp` is set), pipeline sizes (unless `pp` is set) and, with
    `searches_offload`, `optimizer.offload_during_rollout`.
    """
    usable = int(gpu_bytes * USABLE_SHARE)
    sizes = [tp for tp in (1, 2, 4, 8, 16) if tp <= min(num_gpus, gpus_per_node) and num_gpus % tp == 0]
    stages = [pp] if pp else [1, *(size for size in (2, 4, 8, 16) if size <= shape.num_layers)]
    offloads = {base.offload_during_rollout, searches_offload and not base.cpu_offload}
    found = []
    for tp in sizes:
        for recompute in ("none", "selective", "full"):
            layouts = [
                replace(
                    base,
                    tp=tp,
                    pp=size,
                    dp=num_gpus // (tp * size),
                    recompute=recompute,
                    engine_tp=engine,
                    offload_during_rollout=offload,
                )
                for size in stages
                if num_gpus % (tp * size) == 0
                for engine in ([base.engine_tp] if base.engine_tp else sizes)
                for offload in ([True] if base.offload_during_rollout else sorted(offloads))
            ]
            if layouts:
                options = [_consider(shape, layout, work, gpu, usable, gpus_per_node) for layout in layouts]
                found.append(min(options, key=_preference))
    fits = sorted((c for c in found if not c.why_not), key=lambda c: (c.step_seconds, c.peak_bytes))
    return fits + sorted((c for c in found if c.why_not), key=lambda c: c.peak_bytes)


def _preference(candidate: Candidate) -> tuple[bool, float, float, bool]:
    """Return a sort key: layouts that fit first, the fastest first; the others by memory.

    Between equal layouts, prefer an engine of the trainer's tensor-parallel size, which needs no second copy
    of the weights.
    """
    layout, fails = candidate.layout, bool(candidate.why_not)
    return (
        fails,
        candidate.peak_bytes if fails else 0,
        candidate.step_seconds,
        layout.engine_ranks != layout.tp,
    )


def _consider(
    shape: Architecture, layout: Layout, work: Work, gpu: Gpu, usable: int, gpus_per_node: int
) -> Candidate:
    indivisible = [
        f"{field} {size}"
        for field, size in (
            ("heads", shape.num_heads),
            ("KV heads", shape.num_kv_heads),
            ("MLP width", shape.ffn_hidden_size),
        )
        if size % max(layout.tp, layout.engine_ranks)
    ]
    training = train_bytes(shape, layout)
    without_cache = rollout_bytes(shape, layout, 0)
    per_token = max(1, kv_bytes_per_token(shape, layout))
    longest = per_token * (work.prompt_tokens + work.longest_response)
    wanted = longest * min(work.max_num_seqs, -(-work.num_rollouts // layout.num_engines))
    room = usable - sum(without_cache.values())
    rollout = {**without_cache, "KV cache": max(0, min(wanted, room))}
    why_not = ""
    if indivisible:
        why_not = f"tp {max(layout.tp, layout.engine_ranks)} does not divide {', '.join(indivisible)}"
    elif work.num_rollouts < layout.dp:
        why_not = f"{work.num_rollouts} answers per step for {layout.dp} data-parallel ranks"
    elif sum(training.values()) > usable:
        why_not = f"training needs {sum(training.values()) / 2**30:.1f} GiB of {usable / 2**30:.1f} usable"
    elif room < min(wanted, FEWEST_LONGEST * longest):
        why_not = f"{max(0, room) / 2**30:.1f} GiB are left for the KV cache, {FEWEST_LONGEST} longest answers take more"
    # If the KV cache holds fewer sequences than requested, fewer are decoded at the same time.
    decoding = max(1, int(rollout["KV cache"] // max(1, longest)))
    limited = replace(work, max_num_seqs=min(work.max_num_seqs, decoding))
    return Candidate(layout, training, rollout, seconds(shape, layout, limited, gpu, gpus_per_node), why_not)
