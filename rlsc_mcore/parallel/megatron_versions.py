"""Contain the differences between the supported versions of Megatron-Core.

These are 0.16.1 and, on Python 3.12 and newer, 0.19.2.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import __version__
from megatron.core.dist_checkpointing import serialization

_IS_0_19 = int(__version__.split(".")[1]) >= 19

SAVE_OPTIONS: dict[str, Any] = {"async_strategy": "mcore"} if _IS_0_19 else {}
"""Options of `dist_checkpointing.save`: the default writer of 0.19 needs a package that is not required here."""


class _CommonState:
    """Write the unsharded state of a checkpoint, which 0.19 would pickle into a file of tensors."""

    @staticmethod
    def save_common(values: Any, folder: Any) -> None:
        raise RuntimeError("a checkpoint is saved outside of common_state_as")


def _common_writer() -> tuple[Any, str]:
    if _IS_0_19:
        return _CommonState, "save_common"
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

    return TorchCommonSaveStrategy, "save_common"


COMMON_STATE_WRITER = _common_writer()
"""(owner, name) of the function that writes a checkpoint's unsharded state, inside `common_state_as`."""


@contextlib.contextmanager
def common_state_as(save: Callable[[Any, Any], None], load: Callable[[Any], Any]) -> Iterator[None]:
    """Save and load the unsharded state of checkpoints with these functions, not by pickle.

    They replace Megatron's inside the block. `save` receives (values, folder) on every rank, `load` receives
    (folder). Mutates Megatron-Core until the end of the block.
    """
    patches = _patches_0_19(save, load) if _IS_0_19 else _patches_0_16(save, load)
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in patches]
    for owner, name, function in patches:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _patches_0_16(save: Callable[[Any, Any], None], load: Callable[[Any], Any]) -> list[tuple[Any, str, Any]]:
    from megatron.core.dist_checkpointing.strategies.common import (
        TorchCommonLoadStrategy,
        TorchCommonSaveStrategy,
    )

    return [
        (TorchCommonSaveStrategy, "save_common", lambda strategy, values, folder: save(values, folder)),
        (TorchCommonLoadStrategy, "load_common", lambda strategy, folder: load(folder)),
    ]


def _patches_0_19(save: Callable[[Any, Any], None], load: Callable[[Any], Any]) -> list[tuple[Any, str, Any]]:
    """Return the patches for 0.19: take the state out of the sharded objects before they are written."""
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    write_shards = TorchDistSaveShardedStrategy.async_save

    def async_save(
        strategy: Any, sharded_state_dict: dict[str, Any], checkpoint_dir: Any, *options: Any
    ) -> Any:
        common_state = sharded_state_dict.pop("common_state")
        _CommonState.save_common(common_state.data, checkpoint_dir)
        return write_shards(strategy, sharded_state_dict, checkpoint_dir, *options)

    return [
        (_CommonState, "save_common", staticmethod(save)),
        (TorchDistSaveShardedStrategy, "async_save", async_save),
        (serialization, "load_common_state_dict", load),
    ]


def use_cpu_streams() -> None:
    """Make `torch.cuda.current_stream` return the CPU's stream, for a process without a GPU.

    No effect with Megatron-Core 0.16. The gradient reduction of 0.19 requests the current stream even if it
    then waits for no event.
    """
    if _IS_0_19:
        torch.cuda.current_stream = lambda device=None: torch.cpu.current_stream()  # type: ignore[assignment,return-value]
