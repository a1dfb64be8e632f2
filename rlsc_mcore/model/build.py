"""Build the policy: a Megatron-Core `GPTModel` whose head returns token log-probabilities."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from rlsc_mcore.config import Config
from rlsc_mcore.model.architecture import (
    layer_spec,
    transformer_config,
    uses_transformer_engine,
)
from rlsc_mcore.model.hf_checkpoint import load_weights
from rlsc_mcore.model.lora import ADAPTERS, LoraAdapters, attach_adapters
from rlsc_mcore.model.shape import Architecture, read_architecture
from rlsc_mcore.model.torch_layers import RotaryFactors
from rlsc_mcore.model.weight_map import BoundWeight, bind_weights, describe_weights, join_stages
from rlsc_mcore.observability.console import Reporter, counted
from rlsc_mcore.parallel.backend import Backend
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.types import PackedBatch

# (hidden [T / tp, H] on this rank, output weight [Vp, H]) -> any scores that the caller computes
Head = Callable[[torch.Tensor, torch.Tensor], Any]


class PolicyModel(GPTModel):
    """`GPTModel` that passes hidden states and output weight to a head function instead of materializing
    logits.

    The head runs inside `forward`, so that Megatron's data-parallel hooks run where each parameter is used.
    """

    def score(self, batch: PackedBatch, head: Head) -> Any:
        """Run the packed batch and return the result of `head` on the last hidden states; collectives over
        the TP group."""
        return self(batch, head=head)

    def free_quantized_weights(self) -> None:
        """Free the fp8 copies of the weights in TransformerEngine's layers; the next pass recreates them."""
        for module in self.modules():
            workspaces = getattr(module, "_fp8_workspaces", None)
            if workspaces:
                workspaces.clear()

    def forward(self, batch: Any, *args: Any, head: Head | None = None, **kwargs: Any) -> Any:
        """Score a `PackedBatch` with `head`; without a head, behave as `GPTModel`."""
        if head is None:
            return super().forward(batch, *args, **kwargs)
        self._head: Head | None = head
        try:
            token_ids = batch.token_ids[None]
            return super().forward(
                token_ids, torch.zeros_like(token_ids), None, packed_seq_params=packed_seq_params(batch)
            )
        finally:
            self._head = None

    def _preprocess(self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any) -> Any:
        """Embed the tokens. If attention applies the rotation (`SDPACoreAttention`), also attach the batch's
        rotary factors to `packed_seq_params`."""
        prepared = super()._preprocess(*args, packed_seq_params=packed_seq_params, **kwargs)
        if hasattr(self, ADAPTERS) and self.pre_process and torch.is_grad_enabled():
            # Megatron's recomputation returns no gradient from layers whose input needs none.
            prepared[0].requires_grad_()
        lengths = getattr(packed_seq_params, "sequence_lengths", None)
        if lengths is None or self.config.apply_rope_fusion:
            return prepared
        decoder_input, angles, *rest = prepared
        packed_seq_params.rotary = RotaryFactors.of(angles, lengths, self.config.params_dtype)  # type: ignore[union-attr]
        return (decoder_input, None, *rest)  # without angles Megatron's attention applies no rotation

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        head = getattr(self, "_head", None)
        if head is None:
            return super()._postprocess(hidden_states, *args, **kwargs)
        if not self.post_process:  # not the last pipeline stage: send the hidden states on
            return hidden_states
        if self.share_embeddings_and_output_weights and self.pre_process:
            return head(hidden_states.squeeze(1), self.shared_embedding_or_output_weight())
        # Only the weight of the output layer is used; the layer itself is not called. Run its pre-forward
        # hooks, which wait for an overlapped all-gather of the weight.
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return head(hidden_states.squeeze(1), weight)


def packed_seq_params(batch: PackedBatch) -> PackedSeqParams:
    """Describe the batch's sequence boundaries to Megatron's attention."""
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )
    params.sequence_lengths = list(batch.sequence_lengths)  # type: ignore[attr-defined]  # avoids a device-to-host copy
    return params


@dataclass(frozen=True)
class Policy:
    """The trainer's model on this rank, with the mapping of its weights to Hugging Face and vLLM names."""

    model: PolicyModel
    megatron_config: TransformerConfig
    architecture: Architecture
    weights: list[BoundWeight]  # of this rank's pipeline stage
    model_weights: list[
        BoundWeight
    ]  # of all stages, in the same order on all ranks; other stages' are on the meta device
    source: Path  # Hugging Face folder of the weights
    padded_vocab_size: int
    transformer_engine: bool
    adapters: LoraAdapters | None = None  # None: all weights are trained

    @property
    def vocab_start(self) -> int:
        """Index of the first vocabulary row of this rank."""
        per_rank = self.padded_vocab_size // self.megatron_config.tensor_model_parallel_size
        return self.model.pg_collection.tp.rank() * per_rank


def build_policy(
    config: Config, folder: Path, backend: Backend, groups: Groups, *, load: bool = True
) -> Policy:
    """Build the model on this rank's device and load its weights from `folder` (unless `load` is False).

    Adapters need the weights before training: a caller that loads a checkpoint of adapters passes `load`.
    Collective over the world.
    """
    architecture = read_architecture(folder)
    layers = config.parallel.stage_layers or architecture.stage_layers(groups.pp_size)
    megatron_config = transformer_config(
        architecture,
        config.policy_model,
        backend,
        tp=groups.tp_size,
        recompute=config.training.recompute,
        stage_layers=layers,
    )
    transformer_engine = uses_transformer_engine(config.policy_model, backend)
    backend.seed(config.training.seed)
    padded_vocab_size = architecture.padded_vocab_size(groups.tp_size)
    with backend.megatron():
        model = PolicyModel(
            config=megatron_config,
            transformer_layer_spec=layer_spec(megatron_config, transformer_engine),
            vocab_size=padded_vocab_size,
            max_sequence_length=architecture.max_position_embeddings,
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=architecture.rotary_base,  # type: ignore[arg-type]  # annotated int, used as a float
            rope_scaling=architecture.rope_scaling_factor is not None,
            rope_scaling_factor=architecture.rope_scaling_factor or 8.0,
            pre_process=groups.pp_rank == 0,
            post_process=groups.is_last_stage,
        ).to(backend.device)
    if transformer_engine:
        fuse_gradient_accumulation(model)
    weights = bind_weights(model, architecture, [layer.layer_number - 1 for layer in model.decoder.layers])
    if load:
        with Reporter(groups.is_main).bar("loading weights, parameters", len(weights)) as bar:
            load_weights(
                weights,
                architecture,
                folder,
                groups.tp_rank,
                groups.tp_size,
                progress=lambda each: counted(each, bar),
            )
    adapters = None
    if config.lora.is_on:
        adapters = attach_adapters(
            model,
            weights,
            architecture,
            config.lora,
            groups,
            config.training.seed,
            on_host=backend.is_cuda and config.lora.base_on_host,
        )
    model_weights = join_stages(
        weights,
        groups.pp_rank,
        groups.gather_objects_over_model(describe_weights(weights))[:: groups.tp_size],
    )
    return Policy(
        model,
        megatron_config,
        architecture,
        weights,
        model_weights,
        folder,
        padded_vocab_size,
        transformer_engine,
        adapters,
    )


def fuse_gradient_accumulation(model: PolicyModel) -> None:
    """Let TransformerEngine's linear layers add weight gradients to Megatron's buffers inside their matrix
    products.

    This avoids one bfloat16 copy of each gradient, and its rounding, per micro-batch. Megatron's own flag
    would also apply to its output layer and require Apex there; this package does not call that layer.
    """
    for module in model.decoder.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
