"""List the supported model families, one row each. Shape reading, checks, planner and engine read this table.
Imports no torch.

A family with Llama's weight names needs only a row here. Other weight names need a rule in
`model/weight_map.py`. Other layers need a layer specification in `model/architecture.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Properties of one family, identified by the class name in its config.json."""

    architecture: str  # `architectures` of config.json
    vllm_module: str  # module of vLLM that holds the class of the same name
    qkv_bias: bool = False  # the attention's input projections have biases
    qk_norm: bool = False  # queries and keys are normalised per head
    head_dim_is_derived: bool = False  # vLLM uses hidden_size / heads and ignores head_dim of config.json


_ROWS = (
    Family("Qwen2ForCausalLM", "vllm.model_executor.models.qwen2", qkv_bias=True, head_dim_is_derived=True),
    Family("Qwen3ForCausalLM", "vllm.model_executor.models.qwen3", qk_norm=True),
    Family("LlamaForCausalLM", "vllm.model_executor.models.llama"),
)
FAMILIES = {row.architecture: row for row in _ROWS}
