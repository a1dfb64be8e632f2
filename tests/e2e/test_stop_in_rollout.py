"""A stop signal in the middle of long answers: how soon the engine is left, and why what was finished is not
kept."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from tests.e2e.test_hot_swap import EMBEDDED, make_session
from tests.helpers.folders import make_runnable_folder
from tests.helpers.ranks import run_ranks

ABORT_LIMIT_S = 5.0
LONGEST = 3000  # tokens, as in the paper
LONG = [
    "--rollout.max-new-tokens", str(LONGEST), "--rollout.max-num-seqs", "32", "--data.questions-per-step", "4",
    "--rollout.num-samples", "8", "--rollout.temperature", "1.0", "--rollout.kv-cache-gib", "0.5",
]  # fmt: skip


def abort_a_long_rollout(run: str, model: str) -> dict[str, Any]:
    """SIGTERM arrives two seconds into a rollout that would take minutes; then what a session does with it,
    timed."""
    from rlsc_mcore.config_file import parse_config
    from rlsc_mcore.rollout.engine import GenerationInterrupted
    from rlsc_mcore.training.session import Session
    from rlsc_mcore.training.signals import StopRequest
    from tests.e2e.test_hot_swap import FLAGS

    seen: dict[str, Any] = {}
    with StopRequest().listening() as stop:
        session = Session(parse_config(["--run-dir", run, "--model.path", model, *FLAGS, *LONG]), stop)
        engine, steps = session.engine._llm.llm_engine, []
        original = engine.step

        def counted() -> Any:
            steps.append(time.monotonic())
            return original()

        engine.step = counted

        def interrupt() -> None:
            while len(steps) < 20:
                time.sleep(0.05)
            time.sleep(2)
            seen["unfinished"] = engine.get_num_unfinished_requests()
            seen["signalled"] = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=interrupt, daemon=True).start()
        try:
            session.sample(0)
        except GenerationInterrupted:
            seen["left_after_s"] = time.monotonic() - seen["signalled"]
        seen["steps"] = len(steps)
        seen["still running"] = engine.has_unfinished_requests()
        session.engine.reset_prefix_cache()  # refuses while requests are unfinished
        session.save(0)
        seen["saved_after_s"] = time.monotonic() - seen["signalled"]
    return seen


def test_a_long_rollout_is_left_within_five_seconds(tmp_path: Path) -> None:
    folder = make_runnable_folder(tmp_path / "model", max_position_embeddings=LONGEST + 200)
    (seen,) = run_ranks(1, abort_a_long_rollout, str(tmp_path / "run"), str(folder))
    assert seen["unfinished"] > 0 and seen["steps"] < LONGEST  # it was in the middle
    assert seen["left_after_s"] < ABORT_LIMIT_S, seen
    assert not seen["still running"]


class Lengths:
    """Progress that keeps the number of tokens of each finished request."""

    def __init__(self) -> None:
        self.finished: list[int] = []

    def advance(self, amount: int) -> None:
        self.finished.append(amount)


def lengths_at_an_abort(run: str) -> tuple[list[int], list[int], list[int]]:
    """Lengths of the answers that are finished when half of all are; of all; and of all, asked again."""
    from rlsc_mcore.rollout.engine import GenerationInterrupted, SamplingRequest

    session = make_session(Path(run), EMBEDDED)
    requests = [
        SamplingRequest(prompt, 1, 1.0, 48, seed) for seed, prompt in enumerate(session.inputs.prompts[:64])
    ]
    lengths = Lengths()
    finished = lengths.finished
    try:
        session.engine.generate(
            requests, progress=lengths, should_stop=lambda: len(finished) >= len(requests) / 2
        )
        raise AssertionError("was not interrupted")
    except GenerationInterrupted:
        session.engine.reset_prefix_cache()
    again = [[len(answer.token_ids) for (answer,) in session.engine.generate(requests)] for _ in range(2)]
    return finished, again[0], again[1]


def test_answers_that_finish_first_are_short_ones(tmp_path: Path) -> None:
    """The reason for the rule: a step made of them would train towards short answers. All are sampled again,
    the same."""
    ((finished, whole, again),) = run_ranks(1, lengths_at_an_abort, str(tmp_path / "run"))
    assert len(whole) == 64 > len(finished) >= 32 and whole == again
    assert sum(finished) / len(finished) < 0.8 * sum(whole) / len(whole)
    assert max(finished) <= sorted(whole)[len(finished) + 8]  # the quickest, whatever they say
