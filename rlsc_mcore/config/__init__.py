"""Declare the configuration: one frozen dataclass per section, validated field by field. Imports no torch."""

from rlsc_mcore.config.errors import CollectiveRunError, ConfigError, RunError, one_line
from rlsc_mcore.config.machine import ObservabilityConfig, OpsConfig
from rlsc_mcore.config.model import LORA_TARGETS, LoraConfig, ModelConfig
from rlsc_mcore.config.objective import AlgorithmConfig, Confidence, DistillConfig
from rlsc_mcore.config.run import Config, check_answers_per_step
from rlsc_mcore.config.sampling import (
    LOWEST_TEMPERATURE,
    TEMPLATES,
    DataConfig,
    EvaluationConfig,
    RolloutConfig,
)
from rlsc_mcore.config.training import OptimizerConfig, ParallelConfig, TrainingConfig

__all__ = [
    "LORA_TARGETS",
    "LOWEST_TEMPERATURE",
    "TEMPLATES",
    "AlgorithmConfig",
    "CollectiveRunError",
    "Confidence",
    "Config",
    "ConfigError",
    "DataConfig",
    "DistillConfig",
    "EvaluationConfig",
    "LoraConfig",
    "ModelConfig",
    "ObservabilityConfig",
    "OpsConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RolloutConfig",
    "RunError",
    "TrainingConfig",
    "check_answers_per_step",
    "one_line",
]
