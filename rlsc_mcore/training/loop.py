"""Run the training loop: questions -> rollouts -> packed batches -> weighted loss -> update -> hot swap."""

from time import perf_counter
from typing import Any

from rlsc_mcore.rollout.engine import GenerationInterrupted
from rlsc_mcore.training.session import Session


def train(session: Session) -> dict[str, Any] | None:
    """Run the remaining steps and return the evaluations before and after.

    Returns None if a stop signal ended the run. The run is saved every `training.save_every` steps, at the
    end, and after a stop signal. A stop during sampling discards all answers of that step: the resumed run
    samples them again, bit for bit (docs/hot_swap.md gives the reason). The resumed run also makes an
    evaluation that a stop interrupted. A condition of `training.stop_on` ends the run before
    `training.num_steps`.
    """
    start = perf_counter()
    last, every = session.config.training.num_steps, session.config.training.save_every
    steps_done, stopped_on = session.start_step, None
    try:
        before = session.evaluate("before")
        for step in range(session.start_step, last):
            stopped_on = session.met_condition()
            if stopped_on is not None:
                session.end_early(steps_done, stopped_on)
                break
            rollouts = session.sample(step)
            result = session.train(step, rollouts)
            session.hot_swap()
            session.record(step, rollouts, result)
            steps_done = step + 1
            if steps_done == last or (every and steps_done % every == 0):
                session.save(steps_done)
            session.check_stop()
        after = session.evaluate("after")
        session.saver.finish()
    except GenerationInterrupted:
        session.save(steps_done)
        session.saver.finish()
        return None
    return {
        "before": before,
        "after": after,
        "steps": steps_done,
        "stopped_on": stopped_on,
        "train_seconds": perf_counter() - start,
    }
