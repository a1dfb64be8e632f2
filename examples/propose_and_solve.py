"""Let one model propose arithmetic programs and solve them, after Absolute Zero (arXiv 2505.03335).

    python examples/propose_and_solve.py runs/propose_and_solve --rounds 3

No question and no label is given: Python runs the programs. A round is three runs of `rlsc train`:

    propose   samples programs; reward 1 for a program that runs (`grpo`)
    solve     answers "Compute PROGRAM."; reward 1 for Python's result in the box (`grpo`)
    rank      trains the proposer on its programs (`offline_rewards`); with s the share of right answers,
              a program's reward is 1 - s, or 0 if s = 0 (equation 4 of the paper), minus the mean reward

A program is read from the first two lines of calculation of a response (`program_reward.read_program`).
Options after the folder are `--rounds` and those of `rlsc train`, which hold for all runs.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the rewards of the same programs
from program_reward import read_program, reward

HERE = Path(__file__).resolve().parent
PROMPT = "Write a program."
MOST_PROGRAMS = 64  # in a round
REWARDS = HERE / "program_reward.py"
PROPOSE = [
    "--algorithm.objective=grpo",
    f"--algorithm.reward-function={REWARDS}:proposal",
    "--rollout.temperature=1.0",
    "--rollout.num-samples=256",
    "--rollout.max-new-tokens=48",
    "--data.questions-per-step=1",
    "--training.num-steps=2",
]
SOLVE = [
    "--algorithm.objective=grpo",
    f"--algorithm.reward-function={REWARDS}:reward",
    "--rollout.temperature=1.0",
    "--training.num-steps=4",
]
RANK = ["--algorithm.objective=offline_rewards"]


def train(run: Path, model: str, data: Path, flags: Iterable[str]) -> str:
    """Run `rlsc train` on the CPU configuration and return the folder of the trained model."""
    command = [
        sys.executable,
        "-m",
        "rlsc_mcore.cli",
        "train",
        "--config",
        HERE.parent / "configs/tiny_cpu.yaml",
    ]
    command += [
        "--run-dir",
        run,
        "--model.path",
        model,
        "--data.path",
        data,
        "--evaluation.path",
        "None",
        *flags,
    ]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
    return str(run / "export")


def write(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines and return the file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def samples(run: Path, step: int) -> list[dict[str, Any]]:
    """Read the sampled answers of one step of a run."""
    lines = (run / "rollouts" / f"step_{step:06d}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def play(folder: Path, number: int, model: str, flags: list[str]) -> str:
    """Play one round, print its line and return the folder of the trained model."""
    base = folder / f"round_{number}"
    asked = write(folder / "propose.jsonl", [{"question": PROMPT}])
    model = train(base / "propose", model, asked, [*PROPOSE, *flags])
    texts = [row["text"] for row in samples(base / "propose", 1)]
    found = [read_program(text) for text in texts]
    by_program = {program: text for program, text in zip(found, texts, strict=True) if program}
    programs = list(by_program)[:MOST_PROGRAMS]
    if not programs:
        raise SystemExit(f"{base}: none of {len(texts)} proposals is a program that runs")
    questions = [f"Compute {program}." for program in programs]
    data = write(base / "questions.jsonl", ({"question": question} for question in questions))
    model = train(base / "solve", model, data, [*SOLVE, f"--data.questions-per-step={len(programs)}", *flags])
    shares = []
    for step in (0, 3):  # every step asks all programs
        right: list[list[float]] = [[] for _ in programs]
        for row in samples(base / "solve", step):
            right[row["question"]].append(reward(row["text"], questions[row["question"]], None))
        shares.append([sum(values) / len(values) for values in right])
    rewards = [1 - share if share else 0.0 for share in shares[0]]
    mean = sum(rewards) / len(rewards)
    ranked = (
        {"prompt": PROMPT, "response": by_program[program], "reward": value - mean}
        for program, value in zip(programs, rewards, strict=True)
    )
    data = write(base / "ranked.jsonl", ranked)
    flags = [*RANK, f"--data.questions-per-step={len(programs)}", "--training.num-steps=1", *flags]
    model = train(base / "rank", model, data, flags)
    runs = sum(program is not None for program in found) / len(found)
    first, last = (sum(values) / len(values) for values in shares)
    print(
        f"round {number}: {runs:.2f} of the proposals run, {len(programs)} different ones; "
        f"solved {first:.2f} at the first and {last:.2f} at the last step; mean reward of a proposal {mean:.2f}",
        flush=True,
    )
    return model


def main() -> None:
    """Play the rounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options, flags = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model = "embedded:tiny_qwen2"
    for number in range(options.rounds):
        model = play(options.folder, number, model, flags)
    print(f"the trained model: {model}")


if __name__ == "__main__":
    main()
