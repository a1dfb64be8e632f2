"""Train real weights on real questions by RLSC: `python -m benchmarks.bench_real_model --model DIR
--questions gsm8k_test.jsonl`.

Runs `rlsc compare` with SmolLM2-135M-Instruct on GSM8K, with baselines and several seeds. It trains on one
part of the file and evaluates before and after on the other; the parts are separated by a digest of the
questions' text. The same command continues an interrupted comparison. Writes the comparison with the split
and the settings to benchmarks/results/<device>/real_model.json.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402

from benchmarks.harness import RESULTS, about, device_name  # noqa: E402
from rlsc_mcore.commands.compare import run_compare  # noqa: E402
from rlsc_mcore.config import ConfigError  # noqa: E402
from rlsc_mcore.data.questions import read_questions  # noqa: E402
from rlsc_mcore.types import Question  # noqa: E402

HELD_OUT_OF_8 = 2
CONFIG = Path(__file__).parent.parent / "configs" / "smollm2_135m.yaml"


def split(questions: Sequence[Question]) -> tuple[list[Question], list[Question]]:
    """Return (training questions, held-out questions). A quarter is held out, by a digest of the text,
    independent of the order."""

    def is_held_out(question: Question) -> bool:
        return hashlib.sha256(question.text.encode()).digest()[0] % 8 < HELD_OUT_OF_8

    return [q for q in questions if not is_held_out(q)], [q for q in questions if is_held_out(q)]


def write_questions(file: Path, questions: Sequence[Question]) -> Path:
    """Write questions and answers as JSONL."""
    rows = (
        json.dumps({"question": question.text, "answer": question.answer}, ensure_ascii=False) + "\n"
        for question in questions
    )
    file.write_text("".join(rows), encoding="utf-8")
    return file


def main() -> None:
    """Run the comparison and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", required=True, help="model folder: `rlsc prepare smollm2 --output DIR` makes it"
    )
    parser.add_argument("--questions", required=True, help="question file with answers")
    parser.add_argument("--objectives", default="rlsc,self_sft,lower_temperature")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--held-out", type=int, default=256, help="held-out questions that are evaluated, at most"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/real_model"), help="folder of the runs")
    parser.add_argument(
        "--out", type=Path, help="folder of the result (default: benchmarks/results/<device>)"
    )
    options, flags = parser.parse_known_args()
    is_cuda = torch.cuda.is_available()  # does not initialise the GPU, which the runs need
    train, held_out = split(read_questions(options.questions))
    if not train or not held_out:
        raise ConfigError(
            f"--questions {options.questions}: {len(train)} to train on and {len(held_out)} held out; "
            "expected some of both"
        )
    options.runs.mkdir(parents=True, exist_ok=True)
    settings = [
        "--model.path",
        options.model,
        "--data.path",
        str(write_questions(options.runs / "train.jsonl", train)),
    ]
    settings += [
        "--evaluation.path",
        str(write_questions(options.runs / "held_out.jsonl", held_out[: options.held_out])),
    ]
    settings += [
        "--training.num-steps",
        str(options.steps),
        "--data.questions-per-step",
        "16",
        "--rollout.num-samples",
        "16",
    ]
    settings += ["--rollout.max-new-tokens", "320", "--optimizer.lr", "1e-5", "--evaluation.num-samples", "4"]
    if is_cuda:
        settings += [
            "--model.dtype",
            "bfloat16",
            "--rollout.max-num-seqs",
            "256",
            "--training.tokens-per-micro-batch",
            "16384",
        ]
    command = [
        "--config",
        str(CONFIG),
        "--objectives",
        options.objectives,
        "--seeds",
        options.seeds,
        "--output",
        str(options.runs),
    ]
    code = run_compare([*command, *settings, *flags])
    assert code == 0, f"rlsc compare: exit code {code}"
    device = torch.device("cuda" if is_cuda else "cpu")
    result = json.loads((options.runs / "comparison.json").read_text(encoding="utf-8"))
    result["split"] = {
        "train": len(train),
        "held_out": len(held_out),
        "evaluated": min(len(held_out), options.held_out),
    }
    result["about"] = about(device) | {
        "model": Path(options.model).name,
        "questions_file": Path(options.questions).name,
    }
    result["settings"]["flags"] = flags  # without the paths of temporary files
    out = options.out or RESULTS / device_name(device)
    out.mkdir(parents=True, exist_ok=True)
    (out / "real_model.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for kind in ("md", "svg"):
        shutil.copyfile(options.runs / f"comparison.{kind}", out / f"real_model.{kind}")
    print(f"wrote {out}/real_model.json, .md and .svg")


if __name__ == "__main__":
    main()
