"""Train real weights on real questions by RLSC: `python -m benchmarks.bench_real_model --model DIR
--questions gsm8k_test.jsonl`.

Runs `rlsc compare` with SmolLM2-135M-Instruct on GSM8K, with baselines and several seeds. It trains on one
part of the file and evaluates before and after on the other; the parts are separated by a digest of the
questions' text. The same command continues an interrupted comparison. Writes the comparison with the split
and the settings to benchmarks/results/<device>/real_model.json.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from rlsc_mcore.observability.console import quiet_libraries

quiet_libraries()

import torch  # noqa: E402

from benchmarks.harness import command_line, refuse, save  # noqa: E402
from rlsc_mcore.commands.compare import run_compare  # noqa: E402
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
    """Run the comparison and write results/<device>/real_model.json, .md and .svg."""
    options = command_line(
        __doc__,
        flags=True,
        required=["model", "questions"],
        model=(str, "model folder: `rlsc prepare smollm2 --output DIR` makes it"),
        questions=(str, "question file with answers"),
        objectives=("rlsc,self_sft,lower_temperature", "as in rlsc compare"),
        seeds=("0,1,2", "as in rlsc compare"),
        steps=(20, "training steps"),
        held_out=(256, "held-out questions that are evaluated, at most"),
        runs=(Path("runs/real_model"), "folder of the runs"),
    )
    is_cuda = torch.cuda.is_available()  # does not initialise the GPU, which the runs need
    train, held_out = split(read_questions(options.questions))
    if not train or not held_out:
        counts = f"{len(train)} to train on and {len(held_out)} held out"
        refuse(f"--questions {options.questions}: {counts}; expected some of both")
    runs = options.runs
    runs.mkdir(parents=True, exist_ok=True)
    train_file = write_questions(runs / "train.jsonl", train)
    held_out_file = write_questions(runs / "held_out.jsonl", held_out[: options.held_out])
    command = ["--config", str(CONFIG), "--output", str(runs)]
    command += ["--objectives", options.objectives, "--seeds", options.seeds]
    command += ["--model.path", options.model]
    command += ["--data.path", str(train_file), "--evaluation.path", str(held_out_file)]
    command += f"--training.num-steps {options.steps} --data.questions-per-step 16".split()
    command += ["--rollout.num-samples", "16", "--rollout.max-new-tokens", "320", "--optimizer.lr", "1e-5"]
    command += ["--evaluation.num-samples", "4"]
    if is_cuda:
        command += ["--model.dtype", "bfloat16", "--rollout.max-num-seqs", "256"]
        command += ["--training.tokens-per-micro-batch", "16384"]
    code = run_compare([*command, *options.flags])
    assert code == 0, f"rlsc compare: exit code {code}"
    result = json.loads((runs / "comparison.json").read_text(encoding="utf-8"))
    evaluated = min(len(held_out), options.held_out)
    result["split"] = {"train": len(train), "held_out": len(held_out), "evaluated": evaluated}
    result["settings"]["flags"] = options.flags  # without the paths of temporary files
    facts = {"model": Path(options.model).name, "questions_file": Path(options.questions).name}
    path = save(__file__, result, torch.device("cuda" if is_cuda else "cpu"), options.out, **facts)
    for suffix in (".md", ".svg"):
        shutil.copyfile(runs / f"comparison{suffix}", path.with_suffix(suffix))
    print(f"wrote {path}, .md and .svg")


if __name__ == "__main__":
    main()
