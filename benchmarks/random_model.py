"""Write a model folder of a public shape with random weights: `python -m benchmarks.random_model --shape
qwen2.5-1.5b --output DIR`.

The model is for measurements of speed and memory only. The tokenizer is the embedded model's; its few tokens
are the first ids of the vocabulary.
"""

import argparse
import shutil
from pathlib import Path

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from benchmarks.trainers import find_shape, write_config  # noqa: E402
from rlsc_mcore.model.hf_checkpoint import SIDE_FILES, resolve_model_folder  # noqa: E402


def make_model(shape: str, output: Path, layers: int | None = None) -> Path:
    """Write config, bfloat16 weights N(0, 0.02) of a fixed seed and tokenizer into `output` and return it.
    Replaces `output`."""
    if output.exists():
        shutil.rmtree(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_config(find_shape(shape), output, layers)
    torch.manual_seed(0)
    # On a CPU the numbers of a 7B model take minutes.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(output), dtype=torch.bfloat16)
    model.save_pretrained(output)
    source = resolve_model_folder("embedded:tiny_qwen2")
    for name in SIDE_FILES:
        if name.startswith(("tokenizer", "chat", "special")) and (source / name).is_file():
            shutil.copyfile(source / name, output / name)
    return output


def main() -> None:
    """Write one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", required=True, help="a public model's name")
    parser.add_argument("--layers", type=int, help="only so many layers of it")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; it is replaced")
    options = parser.parse_args()
    if options.output.exists() and not (options.output / "config.json").is_file():
        parser.error(f"--output {options.output}: exists and is no model folder; choose another")
    print(f"wrote {make_model(options.shape, options.output, options.layers)}")


if __name__ == "__main__":
    main()
