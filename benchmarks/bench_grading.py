"""Measure the time of grading: `python -m benchmarks.bench_grading [--data FOLDER]`.

Grades several sets of responses with this program and with unmodified math-verify. This program
(`grade_answers`) grades identical responses once, has one rule for each kind of answer, and runs math-verify
in worker processes for the others. Unmodified math-verify grades one extracted answer after the other without
a cache. `numbers` and `algebra` have 16 responses per question:

- `numbers`: answers of gsm8k, amc23 and aime24 in sentences, boxed or not, right and wrong (needs `--data`);
- `expressions`: the values in the worked solutions of aime24 (the text after the last `=` of a formula), each
  compared with the last value of its solution (needs `--data`);
- `algebra`: fractions, roots, polynomials, intervals, sets, tuples, matrices, equations; most samples repeat
  an answer;
- `algebra_distinct`: the same kinds without repeated pairs, so that only the gold answer can be cached.

Every set runs in new processes, including the workers, so that no run uses results of an earlier one. The CPU
time of all processes is compared (`ratio`: math-verify alone over this program); the start of the workers is
reported separately. Answers on which the two disagree are counted and listed.
"""

import json
import math
import random
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.harness import command_line, in_process, save
from rlsc_mcore.evaluation.benchmarks import load_benchmark
from rlsc_mcore.grading import equality as grading
from rlsc_mcore.grading import symbolic
from rlsc_mcore.grading.extraction import extract_boxed, extract_last_number
from rlsc_mcore.grading.formats import grade_answers
from rlsc_mcore.types import Question

NUM_SAMPLES = 16
MOST_CHARACTERS = 80  # limit of a formula in `expressions`; longer ones are derivations
PLAIN_SECONDS = 2.0  # CPU time per comparison, the same limit as in the workers
PATHS = ("product", "plain")
# Gold answer == equal spellings != different answers; <a+2*b> is a number made from four random ones.
ALGEBRA = r"""
\frac{<a>x+<b>}{<c>} == \frac{<b>+<a>x}{<c>} != \frac{<a>x-<b>}{<c>} != <a>x+\frac{<b>}{<c>}
<a>\sqrt{<b>} == \sqrt{<a*a*b>} == \sqrt{<b>}\cdot <a> != <a+1>\sqrt{<b>} != \sqrt{<a+b>}
x^2+<a+b>x+<a*b> == (x+<a>)(x+<b>) == <a*b>+<a+b>x+x^2 != (x-<a>)(x+<b>) != x^2+<a*b>x+<a+b>
[<a>,<a+b>) == \left[<a>,<a+b>\right) != (<a>,<a+b>) != [<a>,<a+b+1>) != [<a>,<a+b>]
(-\infty,<a>)\cup(<a+b>,\infty) == (<a+b>,\infty)\cup(-\infty,<a>) != (-\infty,<a>]\cup(<a+b>,\infty) != (<a>,<a+b>)
\{<a>,<a+b>,<a+b+c>\} == \{<a+b>,<a+b+c>,<a>\} != \{<a>,<a+b>\} != \{<a>,<b>,<d+40>\}
(<a>,-<b>,\frac{<c>}{<d>}) == \left(<a>,-<b>,\frac{<2*c>}{<2*d>}\right) != (<a>,<b>,\frac{<c>}{<d>})
M{<a> & <b>\\ <c> & <d>} == M{<2*a>/2 & <b>\\ <c> & <d>} != M{<a> & <c>\\ <b> & <d+1>}
y=<a>x+<b> == <a>x+<b>=y == y-<b>=<a>x != y=<a>x-<b> != x=<a>y+<b>
<a>\sin x+<b>\cos x == <b>\cos x+<a>\sin x != <a>\cos x+<b>\sin x != <a>\sin x
<a>+<b>i == <b>i+<a> != <a>-<b>i != <b>+<a>i
\frac{<a>\pi}{<b>} == \frac{<a>}{<b>}\pi == \frac{<2*a>\pi}{<2*b>} != \frac{<b>\pi}{<a+b>}
<a>^{<b>}-1 == -1+<a>^{<b>} != <a>^{<b>}+1 != <b>^{<a+1>}-1
\log_{<a>} <b> == \frac{\ln <b>}{\ln <a>} != \log_{<b+30>} <a> != \ln <b>
"""
ALGEBRA_KINDS = re.sub(r"M\{(.*?)\}", r"\\begin{pmatrix}\1\\end{pmatrix}", ALGEBRA).strip().splitlines()
SENTENCES = ("\\boxed{%s}", "\\boxed{%s.0}", "\\boxed{%s\\text{ dollars}}", "The answer is $\\boxed{%s}$.")
SENTENCES += ("the answer is %s.", "%s")
Sample = tuple[str, Question]


def main() -> None:
    """Measure every set in separate processes and write results/cpu/grading.json."""
    options = command_line(
        __doc__,
        data=(Path, "folder with aime24.jsonl, amc23.jsonl and gsm8k_test.jsonl"),
        repeats=(3, "runs of each side and set"),
    )
    rows = []
    for mix in mixes(options.data):
        runs: dict[str, list[dict[str, Any]]] = {path: [] for path in PATHS}
        for _ in range(options.repeats):
            for path in PATHS:
                runs[path].append(in_process(measure, path, mix, options.data))
        rows.append(summary(mix, runs))
        print(json.dumps(rows[-1]))
    result = {"workers": symbolic.NUM_WORKERS, "repeats": options.repeats, "rows": rows}
    command = "python -m benchmarks.bench_grading" + (" --data DATA" if options.data else "")
    save(__file__, result, torch.device("cpu"), options.out, command=command)


def summary(mix: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Compare grades and CPU time; RuntimeError if two runs of one side disagree."""
    for path in PATHS:
        if len({run["right"] for run in runs[path]}) > 1:
            raise RuntimeError(f"{mix}: two runs of {path} disagree")
    ours, plain = (runs[path][0]["right"] for path in PATHS)
    differing = [i for i in range(len(ours)) if ours[i] != plain[i]]
    count = len(ours)
    ms = {path: [1e3 * run["cpu_s"] / count for run in runs[path]] for path in PATHS}
    middle = statistics.median(ms["product"])
    return {
        "mix": mix,
        "answers": count,
        "right_share": round(ours.count("1") / count, 3),
        "compared_by_math_verify": runs["product"][0]["compared"],
        "differ_from_math_verify": len(differing),
        "first_that_differ": [runs["product"][0]["texts"][i] for i in differing[:5]],
        "cpu_ms_per_answer": {path: round(statistics.median(values), 3) for path, values in ms.items()},
        "cpu_ms_per_answer_runs": {
            path: [round(value, 3) for value in values] for path, values in ms.items()
        },
        "ratio": round(statistics.median(ms["plain"]) / middle, 2),
        "answers_per_s_of_one_core_by_cpu": round(1e3 / middle),
        "answers_per_s_by_the_clock": round(
            statistics.median(count / run["wall_s"] for run in runs["product"])
        ),
        "cpu_s_to_start_a_worker": round(statistics.median(run["start_cpu_s"] for run in runs["product"]), 2),
    }


def measure(path: str, mix: str, data: Path | None) -> dict[str, Any]:
    """Grade all samples of a set. Return the grades, the CPU seconds of all processes, and the number of
    comparisons by math-verify."""
    samples = mixes(data)[mix]()
    responses, questions = [text for text, _ in samples], [question for _, question in samples]
    compared = [0]
    start_cpu = 0.0
    if path == "plain":
        compare = plain_comparison()
        begin, begin_cpu = time.perf_counter(), time.process_time()
        right = []
        for response, question in samples:
            extracted = extract_boxed(response) or extract_last_number(response)
            right.append(extracted is not None and compare(extracted, question.answer or ""))
    else:
        for comparer in symbolic.comparers:
            comparer.are_equal("1 + x", "x + 1")
        start_cpu = workers_cpu_s()
        grading.compare_symbolically = counted(grading.compare_symbolically, compared)
        begin, begin_cpu = time.perf_counter(), time.process_time() + start_cpu
        right = [grade.lenient for grade in grade_answers(responses, questions)]
    cpu, wall = time.process_time() + workers_cpu_s() - begin_cpu, time.perf_counter() - begin
    return {
        "right": "".join(str(int(outcome)) for outcome in right),
        "texts": [f"{response[-60:]!r} for {question.answer!r}" for response, question in samples],
        "cpu_s": cpu,
        "wall_s": wall,
        "start_cpu_s": start_cpu / len(symbolic.comparers),
        "compared": compared[0],
    }


def plain_comparison() -> Callable[[str, str], bool]:
    """Compare with unmodified math-verify in this process, with the workers' limit of CPU time. The timer
    cannot interrupt a single C call."""
    import logging

    from math_verify import parse, verify  # type: ignore[import-untyped, unused-ignore]

    logging.disable(logging.CRITICAL)

    def ended(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGPROF, ended)

    def compare(answer: str, gold: str) -> bool:
        signal.setitimer(signal.ITIMER_PROF, PLAIN_SECONDS)
        try:
            parsed = [parse(f"${text}$", parsing_timeout=0) for text in (gold, answer)]
            return bool(verify(*parsed, timeout_seconds=None))
        except Exception:
            return False
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    compare("\\frac{1}{2}", "0.5")
    return compare


def counted(compare: Callable[[str, str], bool], calls: list[int]) -> Callable[[str, str], bool]:
    """Return `compare` with a call counter: every call increments `calls[0]`."""

    def count(answer: str, gold: str) -> bool:
        calls[0] += 1
        return compare(answer, gold)

    return count


def workers_cpu_s() -> float:
    """Return the CPU time of the running workers, user and system."""
    pids = [comparer.worker_pid for comparer in symbolic.comparers if comparer.worker_pid is not None]
    times = (psutil.Process(pid).cpu_times() for pid in pids)
    return sum(each.user + each.system for each in times)


def mixes(data: Path | None) -> dict[str, Callable[[], list[Sample]]]:
    """Return the sets that the available data allows: functions by name that make the samples."""
    found = {
        "algebra": lambda: algebra(140, distinct=False),
        "algebra_distinct": lambda: algebra(280, distinct=True),
    }
    if data is not None:
        found |= {"numbers": lambda: numbers(data), "expressions": lambda: expressions(data)}
    return found


def numbers(data: Path) -> list[Sample]:
    """Return samples for real questions with numeric answers: boxed, with units, in sentences, nearly right,
    cut."""
    stream = random.Random(0)
    samples = []
    for name, most in (("gsm8k", 150), ("amc23", 40), ("aime24", 30)):
        for question in load_benchmark(name, data)[:most]:
            working = f"We are told that {question.text[:400]} So we compute step by step. "
            gold = question.answer or ""
            for _ in range(NUM_SAMPLES):
                is_right = stream.random() < 0.6
                said = gold if is_right else str(int(float(gold)) + stream.choice((-10, -1, 1, 2, 7)))
                samples.append((working + stream.choice(SENTENCES) % said, question))
    return samples


def expressions(data: Path) -> list[Sample]:
    """Return the values of real worked solutions as answers; the last value of each solution is its gold
    answer."""
    samples = []
    for index, line in enumerate((data / "aime24.jsonl").read_text(encoding="utf-8").splitlines()):
        solution = re.sub(r"\\boxed\{([^{}]*)\}", r"\1", json.loads(line)["solution"])
        values = [found.rpartition("=")[2].strip(" .,") for found in re.findall(r"\$([^$]+)\$", solution)]
        kept = (value for value in values if 3 <= len(value) <= MOST_CHARACTERS and not value.isdigit())
        texts = list(dict.fromkeys(kept))
        if len(texts) >= 2:
            question = Question(index, f"expression {index}", texts[-1])
            samples += [(f"so \\boxed{{{text}}}", question) for text in texts]
    return samples


def algebra(num_questions: int, *, distinct: bool) -> list[Sample]:
    """Return samples for generated gold answers: mostly the gold answer's own spelling, else an equal or a
    different expression."""
    stream = random.Random(1)
    samples = []
    for index, (gold, equal, different) in zip(range(num_questions), families(stream), strict=False):
        question = Question(index, f"expression {index}", gold)
        if distinct:
            answers = [*equal, *different]
        else:
            answers = [stream.choice([gold] * 4 + equal * 2 + different) for _ in range(NUM_SAMPLES)]
        samples += [(f"Thus the answer is $\\boxed{{{answer}}}$.", question) for answer in answers]
    return samples


def families(stream: random.Random) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield (gold, equal spellings, different answers) endlessly, from each kind in turn."""
    while True:
        values = dict(zip("abcd", (stream.randint(2, 19) for _ in range(4)), strict=True))
        a, b = values["a"], values["b"]

        def value(match: re.Match[str], values: dict[str, int] = values) -> str:
            terms = (term.split("*") for term in match[1].split("+"))
            return str(sum(math.prod(values.get(x) or int(x) for x in term) for term in terms))

        for kind in ALGEBRA_KINDS:
            gold, *others = re.split(" (==|!=) ", re.sub("<(.+?)>", value, kind))
            equal, different = (
                [text for sign, text in zip(others[::2], others[1::2], strict=True) if sign == wanted]
                for wanted in ("==", "!=")
            )
            if a == b:  # exchanged, the parts of a complex number are the same number
                different = [f"{a}i" if text == f"{b}+{a}i" else text for text in different]
            yield gold, equal, different


if __name__ == "__main__":
    main()
