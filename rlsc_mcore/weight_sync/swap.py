"""Run the swap plan: bind the engine once, then rewrite and verify its parameters at each swap."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from rlsc_mcore.model.build import Policy
from rlsc_mcore.model.weight_map import export_weights
from rlsc_mcore.ops.block_copy import BlockCopy
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.rollout.engine import RolloutEngine, allocate_storage
from rlsc_mcore.weight_sync.exchange import WeightExchange
from rlsc_mcore.weight_sync.plan import Place, SwapPlan, build_plan
from rlsc_mcore.weight_sync.verify import RowSampler, SwapMismatch, compare_checksums, compare_with_tensors

Verify = Literal["off", "checksum", "full"]


class HotSwap:
    """Keep one engine on the trainer's current weights."""

    def __init__(self, policy: Policy, groups: Groups) -> None:
        self.policy_version = 0
        self._policy = policy
        self._groups = groups
        engine_ranks = tuple(
            rank % groups.engine_tp_size for rank in dist.get_process_group_ranks(groups.model_group)
        )
        self.place = Place(
            groups.tp_rank,
            groups.tp_size,
            groups.engine_tp_size,
            engine_ranks,
            groups.pp_rank,
            groups.pp_size,
        )
        self._plan: SwapPlan | None = None
        self._engine_parameters: Mapping[str, nn.Parameter] = {}
        self._tensors: dict[str, torch.Tensor] = {}  # the engine's tensors, as bound
        self._sampler: RowSampler | None = None
        self._local: BlockCopy | None = None
        self._exchange: WeightExchange | None = None
        self._num_swaps = 0

    @torch.no_grad()
    def bind(self, module: nn.Module) -> None:
        """Point the engine's parameters at the trainer's where the layouts agree.

        vLLM calls this while it loads, before `fill`. Mutates `module`. Captured CUDA graphs would not see
        later changes of the pointers, so this happens exactly once. The engine's own parameters are zero
        until `fill`. Buffers and index tables are not allocated here: they would be part of vLLM's sleep
        pool, which frees them.
        """
        assert self._plan is None, "an engine is bound once"
        self._engine_parameters = dict(module.named_parameters())
        shapes = {
            name: (parameter.shape, parameter.dtype) for name, parameter in self._engine_parameters.items()
        }
        self._plan = build_plan(self._policy.model_weights, self._policy.architecture, shapes, self.place)
        for alias in self._plan.aliases:
            self._engine_parameters[alias.engine_name].data = alias.source
        for copied in self._plan.copies:
            allocate_storage(self._engine_parameters[copied.engine_name])
            self._engine_parameters[copied.engine_name].data.zero_()
        self._tensors = {name: parameter.data for name, parameter in self._engine_parameters.items()}

    @torch.no_grad()
    def fill(self) -> None:
        """Write the engine's own tensors for the first time; collective over the model group.

        Call it after the engine is built. Allocates the buffers of the exchange (none if no bytes cross
        ranks).
        """
        plan = self._bound_plan()
        targets, sources = [], []
        for copied in plan.copies:
            for block in copied.blocks:
                if block.source_rank == self.place.member:
                    targets.append(
                        self._tensors[copied.engine_name].narrow(
                            copied.axis, block.target_start, block.length
                        )
                    )
                    sources.append(copied.source.narrow(copied.axis, block.source_start, block.length))
        self._local = BlockCopy(targets, sources)
        if plan.moved:
            self._exchange = WeightExchange(plan, self._tensors, self._groups.model_group)
        # With different layouts the ranks of a group copy different tensors, but all must sample the same rows.
        copied_names = {copied.engine_name for copied in plan.copies}
        holds_engine = self.place.holds_engine
        weights = [
            weight
            for weight in self._policy.model_weights
            if weight.engine in copied_names or not holds_engine
        ]
        self._sampler = RowSampler(weights, self._policy.architecture, self.place)
        self._refresh()

    @torch.no_grad()
    def swap(self, engine: RolloutEngine, *, verify: Verify = "checksum") -> None:
        """Update the engine to the trainer's weights and increment `policy_version`.

        Collective over the model group. Wakes a sleeping engine and resets its prefix cache. The trainer's
        parameters must be complete: the caller waits for an overlapped parameter gather first. `verify`: see
        `rollout.verify_swap`. Raises `SwapMismatch` on every rank of the group if one of them finds a
        difference.
        """
        with engine.waking():
            self._refresh()
            if verify == "checksum":
                self.verify_checksums()
            elif verify == "full":
                self.verify_full()
        engine.reset_prefix_cache()
        self.policy_version += 1

    def num_aliased(self) -> int:
        """Return the number of engine parameters that share the trainer's storage."""
        return sum(self._is_shared(alias.engine_name, alias.source) for alias in self._bound_plan().aliases)

    def num_copied(self) -> int:
        """Return the number of engine parameters that each swap rewrites."""
        return len(self._bound_plan().copies)

    def own_bytes(self) -> int:
        """Return the bytes of the engine's own tensors and of the exchange's buffers on this rank."""
        own = sum(self._engine_parameters[copied.engine_name].nbytes for copied in self._bound_plan().copies)
        return own + (self._exchange.buffer_bytes if self._exchange is not None else 0)

    def describe(self) -> str:
        """Describe in a few words how the engine receives its weights."""
        how = (
            "received or rewritten"
            if self.place.num_stages > 1
            else "gathered"
            if self._bound_plan().moved
            else "rewritten"
        )
        return (
            f"{self.num_aliased()} parameters shared with the trainer, {self.num_copied()} {how} at each swap"
        )

    @torch.no_grad()
    def verify_checksums(self) -> None:
        """Check the addresses of shared parameters, the checksums of sampled rows and one merged weight.

        Collective over the model group.
        """
        plan = self._bound_plan()
        lost = [
            alias.engine_name
            for alias in plan.aliases
            if not self._is_shared(alias.engine_name, alias.source)
        ]
        assert self._sampler is not None, "fill() comes first"
        sampled = self._sampler.rows(self._num_swaps)
        differing = (
            compare_checksums(sampled, self._tensors, self.place, self._groups.model_group, plan.dtype)
            if sampled
            else []
        )
        stale = self._policy.adapters and self._policy.adapters.stale(self._num_swaps)
        if not self._groups.any_in_model(bool(lost or differing or stale)):
            return
        stale_names = [each for each in self._groups.gather_objects_over_model(stale) if each]
        if stale_names:
            raise SwapMismatch(
                f"hot swap: {stale_names[0]}: the shared weight is not W0 + (alpha / r) B A of the adapter"
            )
        world_ranks = dist.get_process_group_ranks(self._groups.model_group)
        for rank, names_lost in zip(world_ranks, self._groups.gather_objects_over_model(lost), strict=True):
            if names_lost:
                raise SwapMismatch(
                    f"hot swap: rank {rank}: {names_lost[0]} no longer shares the trainer's storage"
                )
        self.verify_full()
        which = f"{differing[0].name}, row {differing[0].row}" if differing else "a row of another rank"
        raise SwapMismatch(f"hot swap: rank {self._groups.rank}: the checksum of {which} differs")

    @torch.no_grad()
    def verify_full(self) -> None:
        """Compare every engine parameter with the tensors that an export writes.

        Collective over the model group.
        """
        policy, groups = self._policy, self._groups
        weights = policy.model_weights
        exported = export_weights(
            weights, policy.architecture, groups.tp_group, groups.tp_size, groups.pp_group
        )
        parameters = {name: parameter.data for name, parameter in self._engine_parameters.items()}
        compare_with_tensors(parameters, weights, exported, self.place, groups.rank)

    def _refresh(self) -> None:
        assert self._local is not None, "fill() comes first"
        self._local.run()
        if self._exchange is not None:
            self._exchange.run()
        self._num_swaps += 1

    def _is_shared(self, name: str, source: torch.Tensor) -> bool:
        return self._engine_parameters[name].data_ptr() == source.data_ptr()

    def _bound_plan(self) -> SwapPlan:
        assert self._plan is not None, "no engine is bound yet"
        return self._plan
