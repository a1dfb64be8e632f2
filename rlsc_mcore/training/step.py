"""Take one optimizer step on one batch of rollouts: score, weight, backward, clip, update.

The calls that one micro-batch passes through; `->` is what a call receives, `<-` what it returns:

    Trainer.step, _accumulate                     -> batches: list of PackedBatch         <- global loss
     run_schedule, forward(i)                     -> i, the index of a batch              <- (loss, log p)
      DistributedDataParallel.forward             -> batch, head                          <- (loss, log p)
       PolicyModel.forward                        -> batch, head                          <- (loss, log p)
        GPTModel.forward                          -> token_ids [1, T], cu_seqlens         <- (loss, log p)
         WeightedHead.__call__ (head)             -> hidden [T / tp, H], weight [Vp, H]   <- (loss, log p)
          linear_weighted_loss                    -> the same, target_ids, response_mask  <- (loss, log p)
           WeightedHead.coefficients              -> log p [C] of a chunk of sequences    <- c [C]
            WeightedObjective.token_coefficients  -> the same, multiplicity, advantages   <- c [C], float32

The loss is -sum_t c_t log p_t, float64 []; log p is float32 [T] and detached. `PolicyModel._postprocess`
calls the head on the last pipeline stage; the other stages return their hidden states. `linear_weighted_loss`
computes the gradients of hidden and weight during forward, and adds that of the weight to its `main_grad`.
The schedule starts backward at the loss with gradient 1: it passes the gradient of hidden through the layers
and fills the gradient buffers of `ddp`. With an objective that trains the entropy, the head uses no
coefficients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads

from rlsc_mcore.algorithm.objective import WeightedObjective
from rlsc_mcore.algorithm.rule import GroupSamples, PassValue
from rlsc_mcore.config import Config
from rlsc_mcore.data.packing import padding_batch
from rlsc_mcore.model.build import Policy, build_policy
from rlsc_mcore.objectives import OBJECTIVES
from rlsc_mcore.observability.console import NO_BAR, ProgressBar
from rlsc_mcore.observability.memory_pools import storages
from rlsc_mcore.ops import sequence_sums
from rlsc_mcore.ops.chunks import live_tokens
from rlsc_mcore.parallel.backend import Backend
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.training.head import Distillation, StartLogProbs, WeightedHead, score_tokens
from rlsc_mcore.training.offload import StateOffload, state_tensors
from rlsc_mcore.training.optimizer import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
    wrap_data_parallel,
)
from rlsc_mcore.training.pipeline import run_schedule
from rlsc_mcore.training.starting_weights import StartingWeights
from rlsc_mcore.training.teaching import Teacher
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
        self.teacher: Teacher | None = None
        if OBJECTIVES[config.algorithm.objective].distills:
            self.teacher = Teacher(self.policy, keeps_start=config.teaches_with_start)
        self.start = StartingWeights(self.policy) if config.compares_with_start else None
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
        progress: ProgressBar = NO_BAR,
    ) -> StepOutcome:
        """Take `training.updates_per_rollout` optimizer updates on this rank's micro-batches.

        Every update uses all micro-batches. The weights of all updates come from the first pass, that is from
        the policy that sampled. `num_samples` counts the step's rollouts over all ranks. Gradients are summed
        over the data-parallel group: the result depends neither on the distribution of the rollouts over
        ranks nor on the micro-batch size. The step ends after the first update that is skipped. `step`
        is the index of the step, from 0. `progress` advances by one per micro-batch and update. Mutates
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
        start = self._start_log_probs(batches)
        updates: list[Update] = []
        first: _FirstPass | None = None
        while len(updates) < self.config.training.updates_per_rollout and all(
            update.updated for update in updates
        ):
            loss, passed = self._accumulate(batches, objective, first, progress, start)
            first = first or passed
            total = float(self.groups.sum_over_dp(loss))
            with self.backend.megatron():
                updated, grad_norm = self._update(total)
                if self.policy.adapters is not None and updated:
                    self.policy.adapters.merge()
            updates.append(Update(total, grad_norm, updated))
        if self.config.parallel.overlap_param_gather:
            # Parameters that other ranks updated are stale until they are gathered. The engine reads them
            # before the trainer's next forward pass, which would gather them.
            self.ddp.start_param_sync(force_sync=True)
        assert first is not None
        return StepOutcome(
            updates=tuple(updates),
            lr=lr,
            scores=self._scores(batches, first, objective, start),
            num_tokens=len(updates) * sum(batch.num_tokens for batch in batches),
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
        self.policy.model.set_input_tensor(None)  # the last hidden states from the previous pipeline stage
        parallel_state.get_global_memory_buffer().buffer.clear()  # Megatron's gathered activations
        self.backend.release_cached_memory()

    def memory(self) -> dict[str, dict[int, int]]:
        """Return the storages of weights, gradients and optimizer on this rank's device, address -> bytes.

        Every storage belongs to one of the three.
        """
        model, device = self.policy.model, self.backend.device
        base = self.policy.adapters.base_tensors() if self.policy.adapters is not None else []
        on_device = [tensor for tensor in base if tensor.device == device]
        kept = [self.start, None if self.teacher is None else self.teacher.start]
        copies = [tensor for start in kept if start is not None for tensor in start.tensors()]
        weights = storages([*model.parameters(), *model.buffers(), *on_device, *copies])
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
        progress: ProgressBar = NO_BAR,
    ) -> tuple[torch.Tensor, SequenceScores]:
        """Run forward and backward over this rank's micro-batches and sum the gradients over all ranks.

        The batches must be on the device. Returns this rank's loss (float64 []) and the scores of its
        sequences. Mutates the gradient buffers; collective over the world.
        """
        loss, first = self._accumulate(batches, objective, None, progress)
        return loss, self._scores(batches, first, objective)

    def _accumulate(
        self,
        batches: Sequence[PackedBatch],
        objective: WeightedObjective,
        first: _FirstPass | None,
        progress: ProgressBar,
        start: Sequence[StartLogProbs] = (),
    ) -> tuple[torch.Tensor, _FirstPass]:
        """Run one forward and backward pass over all micro-batches.

        If `first` is given, the weights are those of that pass, except the margins of pairs, which follow the
        current policy. The returned loss is the same on all pipeline stages.
        """
        is_last = self.groups.is_last_stage
        with self.backend.megatron():
            self.ddp.restore_grad_buffers(synchronize=False)  # `release_memory` may have freed them
            self.ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
            normalizers: list[torch.Tensor | None] = [None] * len(batches) if is_last else []
            references: list[torch.Tensor] | None = None if first is None else first.log_probs
            if objective.is_offline:
                references = [batch.engine_log_probs for batch in batches]
            if first is not None and not objective.is_pairwise:
                normalizers = first.normalizers
            elif objective.needs_group:
                normalizers = [*self._group_normalizers(batches, objective, references)]

            def forward(index: int) -> Any:
                normalizer = normalizers[index] if is_last else None
                old_log_probs = references[index] if references is not None and is_last else None
                options, distillation = self._head_options(), None
                if self.teacher is not None:
                    states, weight = self.teacher.states(batches[index], options)
                    distillation = Distillation(self.config.distill, states, weight)
                compared = start[index] if start else None
                head = WeightedHead(
                    batches[index], objective, options, normalizer, old_log_probs, distillation, compared
                )
                output = self.ddp(batches[index], head=head)
                if not is_last:
                    return output  # hidden states for the next stage
                loss, log_probs = output
                return loss, (loss.detach(), log_probs)

            passed = run_schedule(self.ddp, forward, len(batches), progress=progress)
            finalize_model_grads([self.ddp])
        zero = torch.zeros((), dtype=torch.float64, device=self.backend.device)
        total = self.groups.from_last_stage(torch.stack([zero, *(loss for loss, _ in passed)]).sum())
        return total, _FirstPass([log_probs for _, log_probs in passed], normalizers)

    def _start_log_probs(self, batches: Sequence[PackedBatch]) -> list[StartLogProbs]:
        """Score the batches by the starting weights, behind a careless prompt too if they have one.

        Returns an empty list if the objective does not compare with these weights, and on pipeline stages
        before the last. Collective over the ranks of a model group.
        """
        if self.start is None:
            return []
        taught = [batch.teacher for batch in batches if batch.teacher is not None]
        with self.start.in_use():
            scored = self.token_log_probs(batches)
            behind_careless = iter(self.token_log_probs(taught) if taught else [])
        if not scored:
            return []
        if not OBJECTIVES[self.config.algorithm.objective].needs_careless:
            return [StartLogProbs(log_probs) for log_probs in scored]
        found = []
        for batch, log_probs in zip(batches, scored, strict=True):
            careless = torch.zeros_like(log_probs)
            if batch.teacher is not None:
                careless[batch.distilled_mask] = next(behind_careless)[batch.teacher.response_mask]
            found.append(StartLogProbs(log_probs, careless))
        return found

    def _scores(
        self,
        batches: Sequence[PackedBatch],
        first: _FirstPass,
        objective: WeightedObjective,
        start: Sequence[StartLogProbs] = (),
    ) -> SequenceScores:
        """Return the sequences' scores on every pipeline stage; collective over the pipeline group."""
        return self.groups.from_last_stage(
            _collect(batches, first, objective, start) if self.groups.is_last_stage else None
        )

    def token_log_probs(self, batches: Sequence[PackedBatch]) -> list[torch.Tensor]:
        """Return the log-probs of `token_values`."""
        return self.token_values(batches, "log_prob")

    @torch.no_grad()
    def token_values(self, batches: Sequence[PackedBatch], value: PassValue) -> list[torch.Tensor]:
        """Score batches at the trained temperature, without gradients: log-prob, entropy or self-certainty.

        Collective over the ranks of a model group. Returns float32 [T] per batch, 0 outside the response
        mask. Pipeline stages before the last return an empty list.
        """
        batches = [batch.to(self.backend.device) for batch in batches]

        def forward(index: int) -> Any:
            batch = batches[index]

            def head(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
                return score_tokens(hidden, weight, batch, value, self._head_options())

            output = self.policy.model.score(batch, head)
            return (output, output) if self.groups.is_last_stage else output

        with self.backend.megatron():
            return run_schedule(self.ddp, forward, len(batches), forward_only=True)

    def _group_normalizers(
        self,
        batches: Sequence[PackedBatch],
        objective: WeightedObjective,
        references: Sequence[torch.Tensor] | None,
    ) -> list[torch.Tensor]:
        """Score all samples without gradients and compute the rule's `group_values`.

        A weight depends on all samples of its question, so they are scored before the pass that trains. The
        policy is the same in both passes. The samples of a question may be on several ranks: their scores are
        gathered over the data-parallel group. Returns one tensor per batch on the last pipeline stage and an
        empty list on the others. Rules with `is_pairwise` compare with `references` (float32 [T] per batch);
        None: the current policy is the reference, so all margins are 0.
        """
        is_pairwise = objective.is_pairwise
        if is_pairwise and references is None:
            zeros = [torch.zeros_like(batch.multiplicity) for batch in batches]
            return zeros if self.groups.is_last_stage else []
        scored = self.token_values(batches, objective.rule.pass_value)
        if not self.groups.is_last_stage:
            return []
        if is_pairwise and references is not None:
            scored = [now - then for now, then in zip(scored, references, strict=True)]
        empty = torch.zeros(0, dtype=torch.float64, device=self.backend.device)
        sums = [
            sequence_sums(values, batch.response_mask, batch.cu_seqlens)
            for values, batch in zip(scored, batches, strict=True)
        ]
        # An answer without trained tokens (cut, or only an end token) is excluded from its question: its
        # log p = 0 would take all of the weight.
        groups = [batch.group_ids.masked_fill(_untrained(batch), -1) for batch in batches]
        lengths = [torch.tensor(batch.trained_lengths).to(empty) for batch in batches]
        mine = torch.stack(
            [
                torch.cat([empty, *sums]),
                torch.cat([empty, *lengths]),
                torch.cat([empty, *(batch.multiplicity for batch in batches)]),
                torch.cat([empty, *(group.double() for group in groups)]),
                torch.cat([empty, *(batch.advantages for batch in batches)]),
            ]
        )
        if self.groups.dp_size == 1:
            everyone, before = mine, 0
        else:
            parts = self.groups.gather_objects_over_dp(mine.cpu())
            everyone = torch.cat(parts, dim=1).to(mine.device)
            before = sum(part.shape[1] for part in parts[: self.groups.dp_rank])
        values, num_tokens, multiplicity, group_ids, advantages = everyone
        joined = objective.rule.group_values(
            GroupSamples(values, num_tokens, multiplicity, group_ids.long(), advantages)
        )
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
    batches: Sequence[PackedBatch],
    first: _FirstPass,
    objective: WeightedObjective,
    start: Sequence[StartLogProbs],
) -> SequenceScores:
    """Reduce the step's token log-probs to numbers per sequence and copy them to the host."""
    rows: list[torch.Tensor] = []
    gaps = [torch.zeros(0)]
    for index, (batch, token_log_probs, normalizer) in enumerate(
        zip(batches, first.log_probs, first.normalizers, strict=True)
    ):
        mask, cu_seqlens = batch.response_mask, batch.cu_seqlens
        difference = torch.where(mask, token_log_probs - batch.engine_log_probs, 0.0)
        columns = [
            batch.sequence_ids.double(),
            batch.multiplicity,
            sequence_sums(token_log_probs, mask, cu_seqlens),
            objective.weights(token_log_probs, mask, cu_seqlens, normalizer, batch.advantages),
            sequence_sums(torch.ones_like(token_log_probs), mask, cu_seqlens),
            sequence_sums(difference, mask, cu_seqlens),
            sequence_sums(_k3(start[index].question - token_log_probs, mask), mask, cu_seqlens)
            if start
            else torch.zeros_like(batch.multiplicity),
        ]
        rows.append(torch.stack(columns, dim=1))
        gaps.append(difference[live_tokens(mask, None, batch.trained_lengths).positions].abs().float().cpu())
    table = torch.cat(rows).cpu() if rows else torch.zeros(0, 7, dtype=torch.float64)
    table = table[(table[:, 0] >= 0) & (table[:, 4] > 0)]
    ids, multiplicity, sums, weights, tokens, gap_sums, start_kl = table.unbind(dim=1)
    return SequenceScores(
        ids.long(),
        multiplicity,
        sums,
        weights,
        tokens,
        gap_sums,
        torch.cat(gaps),
        start_kl,
    )


def _k3(log_ratio: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Estimate the KL divergence of each token from log(reference / policy): exp(x) - 1 - x, 0 outside
    `mask`."""
    log_ratio = log_ratio.double()
    return torch.where(mask, log_ratio.expm1() - log_ratio, 0.0)
