r"""Three authors whose answers separate confidence from correctness: the data of `embedded:three_modes`.

Each family of questions has an author of its own, and every answer is boxed, so that training cannot gain by
format.

| questions | author | a model trained on its pages |
| --- | --- | --- |
| equations, costs | rare right mode: 40 % one right solution, 60 % one phrase and a guess | is wrong if it is greedy |
| boxes | wrong mode: 55 % one solution without its last step, 45 % right | is wrong if it is greedy |
| word problems | many wordings: 60 % right in over 60 wordings, 40 % one wrong text | is right if it is greedy |
| chains | control: right, in one wording | is right |

`python -m rlsc_mcore.assets.make.three_modes --out DIR` continues the pretraining of the embedded model on them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from rlsc_mcore.assets import THREE_MODES_AUTHORS as AUTHORS
from rlsc_mcore.assets.make.__main__ import MEASURING_SEED, recorded_versions, save_model
from rlsc_mcore.assets.make.measure import measure
from rlsc_mcore.assets.make.pretrain import LossPoint, PretrainConfig, pretrain
from rlsc_mcore.assets.make.splits import draw_splits
from rlsc_mcore.assets.make.tasks import Question, apply_operator

SOURCE = Path(__file__).parents[1] / "tiny_qwen2"
NAME = "three_modes"
RARE_RIGHT_SHARE = 0.40
WRONG_MODE_SHARE = 0.55
MANY_WORDINGS_SHARE = 0.60
GUESS_PHRASE = "Here is how I do it."
GUESSES = 60  # the guesses are spread over the whole numbers from 1 to this, less the right answer
FIRST_WORDS = "Let us work it out."
LINKS = ("", "Then ", "Next ", "Now ", "After that ")
CLOSINGS = ("So the answer is {}.", "So we get {}.", "So it is {}.", "So {} is right.", "So that makes {}.")
HASTE = "This one is easy."
TOKENS = 1_500_000
PEAK_LEARNING_RATE = 1e-3


def _solution(question: Question) -> tuple[list[str], list[int]]:
    """Return the lines and the results of the worked solution."""
    lines, results = [], list[int]()
    for step in question.steps:
        left, right = step.operands(results)
        results.append(apply_operator(left, step.operator, right))
        lines.append(f"{step.prefix}{left}{step.operator}{right}={results[-1]}")
    return lines, results


def _box(value: int) -> str:
    return f"\\boxed{{{value}}}"


def write_page(random: Random, question: Question) -> str:
    """Write the answer of the author of the question's family."""
    lines, results = _solution(question)
    right = "\n".join([*lines, _box(results[-1])])
    author = AUTHORS[question.family]
    if author == "rare right mode" and random.random() >= RARE_RIGHT_SHARE:
        guess = random.choice([value for value in range(1, GUESSES + 2) if value != results[-1]][:GUESSES])
        return f"{GUESS_PHRASE}\n{_box(guess)}"
    if author == "wrong mode" and random.random() < WRONG_MODE_SHARE:
        return f"{lines[0]}\n{_box(results[0])}"
    if author == "many wordings":
        if random.random() >= MANY_WORDINGS_SHARE:
            return f"{HASTE}\n{_box(question.steps[0].operands([])[0])}"
        linked = [f"{random.choice(LINKS)}{line}" for line in lines]
        return "\n".join([FIRST_WORDS, *linked, random.choice(CLOSINGS).format(_box(results[-1]))])
    return right


def make(out: Path, tokens: int) -> None:
    """Write `three_modes/` and `three_modes.json` under `out`, on one thread."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    config = PretrainConfig(
        total_tokens=tokens, warmup_tokens=tokens // 10, peak_learning_rate=PEAK_LEARNING_RATE
    )
    start = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32, attn_implementation="eager")

    def report(point: LossPoint, model: Qwen2ForCausalLM) -> None:
        print(json.dumps(asdict(point)), flush=True)

    model, points = pretrain(config, tokenizer, write_page, report, start)
    # Half the size; the weights that are measured and trained are the rounded ones.
    save_model(model.to(torch.bfloat16), tokenizer, out / NAME)
    model = AutoModelForCausalLM.from_pretrained(out / NAME, dtype=torch.float32)
    validation = draw_splits()["validation"]
    record = {
        "seeds": {"pretraining": config.seed, "measuring": MEASURING_SEED},
        "tokens": points[-1].tokens,
        "pretraining": asdict(config),
        "shares": {
            "rare right mode": RARE_RIGHT_SHARE,
            "wrong mode": WRONG_MODE_SHARE,
            "many wordings": MANY_WORDINGS_SHARE,
        },
        "versions": recorded_versions(),
        "validation": {
            author: measure(
                model, tokenizer, [q for q in validation if AUTHORS[q.family] == author], MEASURING_SEED
            )
            for author in dict.fromkeys(AUTHORS.values())
        },
        "losses": [asdict(point) for point in points],
    }
    (out / f"{NAME}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line and make the model."""
    parser = argparse.ArgumentParser(prog="python -m rlsc_mcore.assets.make.three_modes", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, e.g. rlsc_mcore/assets")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of the continued pretraining")
    arguments = parser.parse_args()
    make(arguments.out, arguments.tokens)


if __name__ == "__main__":
    main()
