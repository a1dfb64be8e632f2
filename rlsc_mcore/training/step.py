"""Take one optimizer step on one batch of rollouts: score, weight, backward, clip, update.

The calls that one micro-batch passes through; `->` is what a call receives, `<-` what it returns:

    Trainer.step, _accumulate                     -> batches: list of PackedBatch         <- global loss
     run_schedule, forward(i)                     -> i, the index of a batch              <- (loss, log p)
      DistributedDataParallel.forward             -> batch, head                          <- (loss, log p)
       PolicyModel.forward                        -> batch, head                          <- (loss, log p)
        GPTModel.forward                          -> token_ids [1, T], cu_seqlens         <- (loss, log p)
         head                                     -> hidden [T / tp, H], weight [Vp, H]   <- (loss, log p)
          linear_weighted_loss                    -> the same, target_ids, response_mask  <- (loss, log p)
           coefficients (coefficient_fn)          -> log p [C] of a chunk of sequences    <- c [C]
            WeightedObjective.token_coefficients  -> the same, multiplicity, advantages   <- c [C], float32

The loss is -sum_t c_t log p_t, float64 []; log p is float32 [T] and detached. `_weighted_loss` defines `head`
and `coefficients` as closures. `PolicyModel._postprocess` calls `head` on the last pipeline stage; the other
stages return their hidden states. `linear_weighted_loss` computes the gradients of hidden and weight during
forward, and adds that of the weight to its `main_grad`. The schedule starts backward at the loss with gradient
1: it passes the gradient of hidden through the layers and fills the gradient buffers of `ddp`. An objective
that trains the entropy uses `entropy_head`, which has no coefficients.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads

from rlsc_mcore.algorithm.entropy import entropy_loss
from rlsc_mcore.algorithm.objective import WeightedObjective
from rlsc_mcore.config import Config
from rlsc_mcore.data.packing import padding_batch
from rlsc_mcore.model.build import Policy, build_policy
from rlsc_mcore.observability.memory_pools import storages
from rlsc_mcore.ops import linear_token_log_probs, linear_weighted_loss, sequence_sums
from rlsc_mcore.ops.chunks import live_tokens
from rlsc_mcore.parallel.backend import Backend
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.training.offload import StateOffload, state_tensors
from rlsc_mcore.training.optimizer import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
    wrap_data_parallel,
)
from rlsc_mcore.training.pipeline import run_schedule
from rlsc_mcore.types import PackedBatch, SequenceScores, StepOutcome, Update

FP8_ROWS = 16  # TransformerEngine's fp8 products need a multiple of this many rows


@dataclass(frozen=True)
class _FirstPass:
    """Hold the results of the first pass over a step's rollouts that later passes reuse, one entry per batch.

    The results are p_old and the normalisers of the questions. They exist on the last pipeline stage; the
    lists are empty on the other stages.
    """

    log_probs: list[torch.Tensor]  # float32 [T]
    normalizers: list[torch.Tensor | None]  # float64 [S]


class Trainer:
    """Own the policy, its data-parallel wrapper and its optimizer on this rank, and train them."""

    def __init__(
        self, config: Config, folder: Any, backend: Backend, groups: Groups, *, load: bool = True
    ) -> None:
        """Build policy, wrapper and optimizer on this rank; collective over the world."""
        self.config, self.backend, self.groups = config, backend, groups
        self.policy: Policy = build_policy(config, folder, backend, groups, load=load)
        self.ddp: DistributedDataParallel = wrap_data_parallel(self.policy, config, backend)
        self.optimizer = build_optimizer(config, self.ddp, backend)
        self.offload: StateOffload | None = None
        if config.optimizer.offload_during_rollout:
            self.offload = StateOffload(self.optimizer, self.memory()["weights"].keys(), pin=backend.is_cuda)
        # The token count of every batch is a multiple of this: sequence parallelism needs equal shares, and
        # fp8 products need shares of a multiple of 16 rows.
        self.token_multiple = groups.tp_size * (1 if config.model.fp8 == "none" else FP8_ROWS)
        trained = config.algorithm.log_prob_temperature
        self.log_prob_temperature = config.rollout.temperature if trained == "sampling" else 1.0

    def step(
        self,
        batches: Sequence[PackedBatch],
        step: int,
        num_samples: int,
        on_batch: Callable[[], None] = lambda: None,
    ) -> StepOutcome:
        """Take `training.updates_per_rollout` optimizer updates on this rank's micro-batches.

        Every update uses all micro-batches. The weights of all updates come from the first pass, that is from
        the policy that sampled. `num_samples` counts the step's rollouts over all ranks. Gradients are summed
        over the data-parallel group: the result depends neither on the distribution of the rollouts over
        ranks nor on the micro-batch size. The step ends after the first update that is skipped. Mutates
        parameters and optimizer; collective over the world.
        """
        if self.offload is not None:
            self.offload.back()
        objective = WeightedObjective(self.config.algorithm, num_samples)
        if not batches and self.config.parallel.overlap_grad_reduce:
            batches = [
                padding_batch(self.token_multiple)
            ]  # the other ranks reduce gradients in their backward pass: this rank must take part
        batches = [batch.to(self.backend.device) for batch in batches]
        lr = learning_rate(self.config.optimizer, step, self.config.training.num_steps)
        set_learning_rate(self.optimizer, lr)
        updates: list[Update] = []
        first: _FirstPass | None = None
        while len(updates) < self.config.training.updates_per_rollout and all(
            update.updated for update in updates
        ):
            loss, passed = self._accumulate(batches, objective, first, on_batch)
            first = first or passed
            total = float(self.groups.sum_over_dp(loss))
            with self.backend.megatron():
                updated, grad_norm = self._update(total)
            updates.append(Update(total, grad_norm, updated))
        if self.config.parallel.overlap_param_gather:
            # Parameters that other ranks updated are stale until they are gathered. The engine reads them
            # before the trainer's next forward pass, which would gather them.
            self.ddp.start_param_sync(force_sync=True)
        assert first is not None
        return StepOutcome(
            updates=tuple(updates),
            lr=lr,
            scores=self._scores(batches, first, objective),
            num_tokens=len(updates) * sum(len(batch.token_ids) for batch in batches),
        )

    def release_memory(self) -> None:
        """Free the memory that only training needs, before the engine wakes.

        Frees gradients, fp8 copies of the weights, cached workspaces and, if configured, the optimizer's
        state on the device. The gradient buffers keep their views and lose their storage; the next pass
        allocates it again. The workspaces of cuBLAS stay allocated, because the engine's captured graphs use
        them.
        """
        # Drops the optimizer's views of the buffers and its float32 copies of bfloat16 gradients.
        self.optimizer.zero_grad()
        self.ddp.offload_grad_buffers(synchronize=False, empty_cache=False)
        if self.offload is not None:
            self.offload.out()
        self.policy.model.free_quantized_weights()
        parallel_state.get_global_memory_buffer().buffer.clear()  # Megatron's gathered activations
        self.backend.release_cached_memory()

    def memory(self) -> dict[str, dict[int, int]]:
        """Return the storages of weights, gradients and optimizer on this rank's device, address -> bytes.

        Every storage belongs to one of the three.
        """
        model, device = self.policy.model, self.backend.device
        weights = storages([*model.parameters(), *model.buffers()])
        buffers = [*self.ddp.buffers, *self.ddp.expert_parallel_buffers]
        gradients = storages(buffer.grad_data for buffer in buffers)
        return {
            "weights": weights,
            "gradients": gradients,
            "optimizer": storages(
                tensor for tensor in state_tensors(self.optimizer, weights.keys()) if tensor.device == device
            ),
        }

    def accumulate_gradients(
        self,
        batches: Sequence[PackedBatch],
        objective: WeightedObjective,
        on_batch: Callable[[], None] = lambda: None,
    ) -> tuple[torch.Tensor, SequenceScores]:
        """Run forward and backward over this rank's micro-batches and sum the gradients over all ranks.

        The batches must be on the device. Returns this rank's loss (float64 []) and the scores of its
        sequences. Mutates the gradient buffers; collective over the world.
        """
        loss, first = self._accumulate(batches, objective, None, on_batch)
        return loss, self._scores(batches, first, objective)

    def _accumulate(
        self,
        batches: Sequence[PackedBatch],
        objective: WeightedObjective,
        first: _FirstPass | None,
        on_batch: Callable[[], None],
    ) -> tuple[torch.Tensor, _FirstPass]:
        """Run one forward and backward pass over all micro-batches.

        If `first` is given, the weights are those of that pass. The returned loss is the same on all pipeline
        stages.
        """
        with self.backend.megatron():
            self.ddp.restore_grad_buffers(synchronize=False)  # `release_memory` may have freed them
            self.ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            normalizers: list[torch.Tensor | None] = (
                [None] * len(batches) if self.groups.is_last_stage else []
            )
            if first is not None:
                normalizers = first.normalizers
            elif objective.needs_group:
                normalizers = [*self._group_normalizers(batches, objective)]

            def forward(index: int) -> Any:
                batch = batches[index]
                if not self.groups.is_last_stage:
                    return self._weighted_loss(batch, objective, None, None)
                old_log_probs = None if first is None else first.log_probs[index]
                loss, log_probs = self._weighted_loss(batch, objective, normalizers[index], old_log_probs)
                return loss, (loss.detach(), log_probs)

            passed = run_schedule(self.ddp, forward, len(batches), on_batch=on_batch)
            finalize_model_grads([self.ddp])
        zero = torch.zeros((), dtype=torch.float64, device=self.backend.device)
        total = self.groups.from_last_stage(torch.stack([zero, *(loss for loss, _ in passed)]).sum())
        return total, _FirstPass([log_probs for _, log_probs in passed], normalizers)

    def _scores(
        self, batches: Sequence[PackedBatch], first: _FirstPass, objective: WeightedObjective
    ) -> SequenceScores:
        """Return the sequences' scores on every pipeline stage; collective over the pipeline group."""
        return self.groups.from_last_stage(
            _collect(batches, first, objective) if self.groups.is_last_stage else None
        )

    @torch.no_grad()
    def token_log_probs(self, batches: Sequence[PackedBatch]) -> list[torch.Tensor]:
        """Score batches at the trained temperature, without gradients.

        Collective over the ranks of a model group. Returns float32 [T] per batch, 0 outside the response
        mask. Pipeline stages before the last return an empty list.
        """
        batches = [batch.to(self.backend.device) for batch in batches]

        def forward(index: int) -> Any:
            batch = batches[index]

            def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
                return linear_token_log_probs(
                    hidden,
                    weight,
                    batch.target_ids,
                    mask_T=batch.response_mask,
                    num_live=sum(batch.trained_lengths),
                    **self._head_options(),
                )

            output = self.policy.model.score(batch, head)
            return (output, output) if self.groups.is_last_stage else output

        with self.backend.megatron():
            return run_schedule(self.ddp, forward, len(batches), forward_only=True)

    def _weighted_loss(
        self,
        batch: PackedBatch,
        objective: WeightedObjective,
        normalizer: torch.Tensor | None,
        old_log_probs: torch.Tensor | None,
    ) -> Any:
        """Run forward; return (loss, float32 [T] log-probs), or hidden states before the last stage."""
        old_live = (
            None
            if old_log_probs is None
            else old_log_probs[live_tokens(batch.response_mask, None, batch.trained_lengths).positions]
        )

        def coefficients(
            log_probs: torch.Tensor, mask: torch.Tensor, cu_seqlens: torch.Tensor, sequences: slice
        ) -> torch.Tensor:
            current = None
            if old_live is not None:
                start = sum(batch.trained_lengths[: sequences.start])
                current, log_probs = log_probs, old_live[start : start + len(log_probs)]
            normalizer_S = None if normalizer is None else normalizer[sequences]
            multiplicity_S, advantages_S = batch.multiplicity[sequences], batch.advantages[sequences]
            return objective.token_coefficients(
                log_probs, mask, cu_seqlens, multiplicity_S, normalizer_S, advantages_S, current
            )

        def entropy_head(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            log_probs, entropy = linear_token_log_probs(
                hidden,
                weight,
                batch.target_ids,
                mask_T=batch.response_mask,
                num_live=sum(batch.trained_lengths),
                with_entropy=True,
                **self._head_options(),
            )
            divisor = objective.num_samples if objective.algorithm.reduction == "mean" else 1
            loss = entropy_loss(entropy, batch.response_mask, batch.cu_seqlens, batch.multiplicity, divisor)
            return loss, log_probs.detach()

        def head(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return linear_weighted_loss(
                hidden,
                weight,
                batch.target_ids,
                mask_T=batch.response_mask,
                cu_seqlens=batch.cu_seqlens,
                coefficient_fn=coefficients,
                live_counts=batch.trained_lengths,
                unit_upstream=True,
                **self._head_options(),
            )

        return self.ddp(batch, head=entropy_head if objective.trains_entropy else head)

    def _group_normalizers(
        self, batches: Sequence[PackedBatch], objective: WeightedObjective
    ) -> list[torch.Tensor]:
        """Score all samples without gradients and compute the normaliser of each question.

        A weight depends on all samples of its question, so they are scored before the pass that trains. The
        policy is the same in both passes. The samples of a question may be on several ranks: their log-probs
        are gathered over the data-parallel group. Returns one tensor per batch on the last pipeline stage and
        an empty list on the others.
        """
        scored = self.token_log_probs(batches)
        if not self.groups.is_last_stage:
            return []
        empty = torch.zeros(0, dtype=torch.float64, device=self.backend.device)
        sums = [
            sequence_sums(log_probs, batch.response_mask, batch.cu_seqlens)
            for log_probs, batch in zip(scored, batches, strict=True)
        ]
        # An answer without trained tokens (cut, or only an end token) is excluded from its question: its
        # log p = 0 would take all of the weight.
        groups = [batch.group_ids.masked_fill(_untrained(batch), -1) for batch in batches]
        mine = torch.stack(
            [
                torch.cat([empty, *sums]),
                torch.cat([empty, *(batch.multiplicity for batch in batches)]),
                torch.cat([empty, *(group.double() for group in groups)]),
            ]
        )
        if self.groups.dp_size == 1:
            everyone, before = mine, 0
        else:
            parts = self.groups.gather_objects_over_dp(mine.cpu())
            everyone = torch.cat(parts, dim=1).to(mine.device)
            before = sum(part.shape[1] for part in parts[: self.groups.dp_rank])
        joined = objective.rule.group_values(everyone[0], everyone[1], everyone[2].long())
        return list(joined[before : before + mine.shape[1]].split([len(part) for part in sums]))

    def _update(self, loss: float) -> tuple[bool, float]:
        """Clip the gradients and update; return (updated, gradient norm).

        Leaves parameters and moments unchanged if the loss or the gradient norm is not finite.
        """
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not (math.isfinite(grad_norm) and math.isfinite(loss)):  # both values are equal on every rank
            return False, grad_norm
        largest = self.config.optimizer.clip_grad
        if largest > 0:
            clip_gradients(self.optimizer, largest, grad_norm)
        return bool(self.optimizer.step_with_ready_grads()), grad_norm

    def _head_options(self) -> dict[str, Any]:
        return dict(
            temperature=self.log_prob_temperature,
            vocab_size=self.policy.architecture.vocab_size,
            vocab_start=self.policy.vocab_start,
            group=self.groups.tp_group if self.groups.tp_size > 1 else None,
            sequence_parallel=self.groups.tp_size > 1,
            logits_dtype=torch.float32 if self.config.ops.logits_dtype == "float32" else None,
            backend=self.config.ops.backend,
        )


def _untrained(batch: PackedBatch) -> torch.Tensor:
    return torch.tensor([length == 0 for length in batch.trained_lengths], dtype=torch.bool).to(
        batch.group_ids.device, non_blocking=True
    )


def _collect(
    batches: Sequence[PackedBatch], first: _FirstPass, objective: WeightedObjective
) -> SequenceScores:
    """Reduce the step's token log-probs to numbers per sequence and copy them to the host."""
    rows: list[torch.Tensor] = []
    gaps = [torch.zeros(0)]
    for batch, token_log_probs, normalizer in zip(batches, first.log_probs, first.normalizers, strict=True):
        mask, cu_seqlens = batch.response_mask, batch.cu_seqlens
        difference = torch.where(mask, token_log_probs - batch.engine_log_probs, 0.0)
        columns = [
            batch.sequence_ids.double(),
            batch.multiplicity,
            sequence_sums(token_log_probs, mask, cu_seqlens),
            objective.weights(token_log_probs, mask, cu_seqlens, normalizer, batch.advantages),
            sequence_sums(torch.ones_like(token_log_probs), mask, cu_seqlens),
            sequence_sums(difference, mask, cu_seqlens),
        ]
        rows.append(torch.stack(columns, dim=1))
        gaps.append(difference[live_tokens(mask, None, batch.trained_lengths).positions].abs().float().cpu())
    table = torch.cat(rows).cpu() if rows else torch.zeros(0, 6, dtype=torch.float64)
    table = table[(table[:, 0] >= 0) & (table[:, 4] > 0)]
    ids, multiplicity, sums, weights, tokens, gap_sums = table.unbind(dim=1)
    return SequenceScores(ids.long(), multiplicity, sums, weights, tokens, gap_sums, torch.cat(gaps))
