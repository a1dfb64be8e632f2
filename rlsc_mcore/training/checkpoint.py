"""Save and load checkpoints in Megatron's distributed format; a checkpoint folder appears only when complete.

    RUN/checkpoints/step_000010/         Megatron dist_checkpointing: weights, fp32 masters, moments
    RUN/checkpoints/step_000010/common.json     the optimizer's values that are not tensors
    RUN/checkpoints/step_000010/state.json      steps done, policy version, random state, question fingerprint
    RUN/checkpoints/step_000010/manifest.json   size and SHA-256 of every other file
    RUN/checkpoints/latest               a hint: the name above, set by rename once all files are on disk
    RUN/checkpoints/best                 the name of the best checkpoint by `training.keep_best`

Sampling needs no saved state: question order and the seeds of all answers are functions of (seed, step).
"""

import base64
import logging
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from rlsc_mcore.config import one_line
from rlsc_mcore.model.lora import ADAPTERS
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.parallel.megatron_versions import COMMON_STATE_WRITER, SAVE_OPTIONS
from rlsc_mcore.run.folder import BEST, FOLDER, LATEST, latest_checkpoint
from rlsc_mcore.run.machine_errors import explain
from rlsc_mcore.training.checkpoint_files import (
    ELSEWHERE,
    METADATA,
    STATE,
    CheckpointError,
    NewerCheckpoint,
    RunState,
    UnreadableCheckpoint,
    best_checkpoint,
    check_backend,
    delete_older,
    digest,
    no_pickles,
    point,
    read_common,
    read_metadata,
    read_state,
    verify_files,
    write_failure,
    write_manifest,
    write_state,
)
from rlsc_mcore.training.optimizer_state import load_groups, sharded_optimizer, sharded_weights
from rlsc_mcore.training.step import Trainer

_EXTRA_STATE = "_extra_state"
# Megatron-Core 0.16.1 prefixes the keys of an optimizer that is not distributed unless this is set.
_WHOLE_STATE = {"chained_optim_avoid_prefix": True}
logging.getLogger(filesystem_async.__name__).setLevel(
    logging.CRITICAL
)  # CheckpointError already reports a failed write


@dataclass
class _Save:
    """Hold a checkpoint that is being written, for this rank's writing and for the steps after it."""

    state: RunState
    request: Any  # Megatron's request; its finalize functions write metadata and exchange results
    scores: Mapping[int, float]
    buckets: list[Any] = field(
        default_factory=list
    )  # (file, key, (bytes, tensors)) with tensors in host memory
    digests: dict[str, dict[str, Any]] = field(default_factory=dict)
    thread: threading.Thread | None = None

    def write(self) -> None:
        """Write this rank's files and compute their digests.

        Runs in its own thread and touches no trainer state. Megatron's writer forks a process per file, from
        a process that holds CUDA and an engine. This calls the writer's inner function, which does not fork.
        """
        if self.request.async_fn is None:  # nothing to write on this rank
            return
        transforms = self.request.async_fn.args[0]
        written: Any = {}
        for index, bucket in enumerate(self.buckets):
            results: queue.Queue[Any] = queue.Queue()
            count: queue.Queue[int] = queue.Queue()
            count.put(index)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms, index, bucket, results, count, use_fsync=True
            )
            _, outcome = results.get()
            if isinstance(outcome, Exception):
                written = outcome
                break
            written[index] = outcome
            try:
                self.digests[Path(bucket[0]).name] = digest(Path(bucket[0]))
            except OSError as error:
                written = error
                break
        self.request.async_fn_args[-1].put(
            written
        )  # Megatron's finalize function reads it and reports a failure to all ranks
        self.buckets = []


class CheckpointSaver:
    """Save a run's checkpoints, one at a time; `asynchronous` writes them while training continues."""

    def __init__(
        self,
        run_dir: Path,
        trainer: Trainer,
        questions: str,
        *,
        keep_last: int,
        asynchronous: bool = False,
        keep_best: bool = False,
    ) -> None:
        self.folder = run_dir / FOLDER
        self._run_dir, self._trainer, self._questions = run_dir, trainer, questions
        self._keep_last, self._keep_best, self._asynchronous = keep_last, keep_best, asynchronous
        self._save: _Save | None = None
        if trainer.groups.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)

    def save(self, steps_done: int, policy_version: int, scores: Mapping[int, float] | None = None) -> Path:
        """Save a checkpoint after `steps_done` steps; collective over the world.

        Returns the final path. When every rank has written its part, one rename creates that folder and
        `latest` names it. With `asynchronous` the call returns before that and training may continue.
        `scores` (by steps done) determine the best checkpoint. Raises `CheckpointError` if this save or the
        one before it cannot be written (for example on a full disk); the last complete checkpoint stays
        unchanged.
        """
        self.finish()
        final = self._final(steps_done)
        if final.is_dir() and latest_checkpoint(self._run_dir) == final:
            return final
        rng = base64.b64encode(torch.random.get_rng_state().numpy().tobytes()).decode("ascii")
        state = RunState(steps_done, policy_version, self._questions, rng)
        self._together(steps_done, lambda: self._make_folder(steps_done))
        self._together(steps_done, lambda: self._begin(state, scores or {}))
        self._write()
        if not self._asynchronous:
            self.finish()
        return final

    def poll(self) -> None:
        """Complete the current save if every rank has written its files.

        Collective over the world during a save.
        """
        if self._save is None:
            return
        thread = self._save.thread
        if not self._trainer.groups.any(thread is not None and thread.is_alive()):
            self.finish()

    def finish(self) -> None:
        """Wait for the current save and complete it; collective over the world."""
        save, self._save = self._save, None
        if save is None:
            return
        if save.thread is not None:
            save.thread.join()
        self._together(save.state.steps_done, lambda: self._finalize(save))
        self._together(save.state.steps_done, lambda: self._complete(save))

    def _make_folder(self, steps_done: int) -> None:
        if self._trainer.groups.is_main:
            shutil.rmtree(self._partial(steps_done), ignore_errors=True)
            self.folder.mkdir(exist_ok=True)  # not the run folder itself: it may have been moved
            self._partial(steps_done).mkdir()

    def _begin(self, state: RunState, scores: Mapping[int, float]) -> None:
        trainer = self._trainer
        # All results stay in this process. Megatron would start a multiprocessing manager for them by spawn,
        # which imports the entry script again.
        filesystem_async._results_queue = queue.Queue()
        with trainer.backend.megatron(), no_pickles(), _failing_late():
            sharded = sharded_state(trainer, is_loading=False)
            request = dist_checkpointing.save(
                sharded, str(self._partial(state.steps_done)), async_sharded_save=True, **SAVE_OPTIONS
            )
        self._save = _Save(state, request, scores)
        if request.preload_fn is not None:
            self._save.buckets = request.preload_fn()

    def _write(self) -> None:
        save, trainer = self._save, self._trainer
        assert save is not None
        if not self._asynchronous:
            save.write()
            return
        # Tensors that are already on the host belong to the trainer, whose next step overwrites them.
        if not trainer.backend.is_cuda or trainer.offload is not None:
            save.buckets = [
                (file, key, (data, [(i, t.clone()) for i, t in tensors]))
                for file, key, (data, tensors) in save.buckets
            ]
        save.thread = threading.Thread(
            target=save.write, name=f"checkpoint of step {save.state.steps_done}", daemon=True
        )
        save.thread.start()

    def _finalize(self, save: _Save) -> None:
        with self._trainer.backend.megatron(), no_pickles(), _failing_late():
            for finalize in save.request.finalize_fns:
                finalize()

    def _complete(self, save: _Save) -> None:
        groups = self._trainer.groups
        partial, final = self._partial(save.state.steps_done), self._final(save.state.steps_done)
        known = {name: entry for part in groups.gather_objects(save.digests) for name, entry in part.items()}
        if not groups.is_main:
            return
        write_state(partial / STATE, save.state)
        write_manifest(partial, known)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        point(self.folder, LATEST, final.name)
        best = best_checkpoint(self.folder, save.scores) if self._keep_best else None
        if best is not None:
            point(self.folder, BEST, best.name)
        delete_older(self.folder, keep=self._keep_last, newest=final, best=best)

    def _together(self, steps_done: int, act: Callable[[], None]) -> None:
        """Run one part of a save on every rank; collective over the world.

        If it fails on one rank, all ranks raise `CheckpointError` with that rank's reason, and the main rank
        deletes the incomplete folder.
        """
        failure: BaseException | None = None
        try:
            act()
        except (Exception, CheckpointException) as error:
            failure = error
        groups = self._trainer.groups
        reason = None if failure is None else write_failure(failure, self.folder, groups.rank)
        reasons = [each for each in groups.gather_objects(reason) if each is not None]
        if not reasons:
            return
        self._save = None
        if groups.is_main:
            shutil.rmtree(self._partial(steps_done), ignore_errors=True)
        rank, text = next((each for each in reasons if each[1] != ELSEWHERE), reasons[0])
        where = f"rank {rank}: " if groups.world_size > 1 else ""
        whole = (
            "the previous checkpoint is whole"
            if latest_checkpoint(self._run_dir)
            else "there is no earlier checkpoint"
        )
        if not self._run_dir.is_dir():
            whole = "the folder of the run is gone: it was moved or deleted; the checkpoints of before went with it"
        raise CheckpointError(
            f"checkpoint of step {steps_done} not saved to {self.folder}: {where}{text}; {whole}"
        ) from failure

    def _final(self, steps_done: int) -> Path:
        return self.folder / f"step_{steps_done:06d}"

    def _partial(self, steps_done: int) -> Path:
        return self.folder / f"step_{steps_done:06d}.partial"


def load_checkpoint(checkpoint: Path, trainer: Trainer) -> RunState:
    """Load the trainer's weights and optimizer from `checkpoint`; collective over the world.

    The checkpoint may come from any parallel layout. The ranks share the verification of its files. Mutates
    parameters, optimizer state and torch's random state. Raises `CheckpointError` on every rank if a file is
    damaged, before anything is changed.
    """
    groups = trainer.groups
    problem: tuple[str, str] | None = None
    try:
        verify_files(checkpoint, groups.rank, groups.world_size)
        check_backend(checkpoint)
        read_metadata(checkpoint / METADATA)
        read_common(checkpoint)
        state = read_state(checkpoint)
    except (CheckpointError, UnreadableCheckpoint, NewerCheckpoint) as error:
        problem = type(error).__name__, str(error)
    _raise_together(groups, problem)
    sharded = sharded_state(trainer, is_loading=True)
    with trainer.backend.megatron(), no_pickles():
        try:
            loaded = dist_checkpointing.load(sharded, str(checkpoint))
        except CheckpointError:
            raise
        except (Exception, CheckpointException) as error:
            is_agreed = groups.world_size == 1 or isinstance(
                error, CheckpointException
            )  # torch raises a CheckpointException on every rank
            if (
                not is_agreed
                or explain(error) is not None
                or isinstance(error, (MemoryError, torch.OutOfMemoryError))
            ):
                raise
            text = one_line(error, 300)
            raise CheckpointError(
                f"{checkpoint}: its files are as they were saved, but do not load: {text}"
            ) from error
        with torch.no_grad():  # Megatron-Core 0.16.1 writes into views of fp32 leaves
            missing, unexpected = trainer.ddp.module.load_state_dict(loaded["model"], strict=False)
            adapters = trainer.policy.adapters
            frozen = set() if adapters is None else {weight.name for weight in trainer.policy.weights}
            absent = [name for name in missing if not name.endswith(_EXTRA_STATE) and name not in frozen]
            assert not unexpected and not absent, (absent, unexpected)
            if adapters is not None:
                adapters.merge()
            if trainer.config.optimizer.distributed:
                load_groups(trainer.optimizer, loaded["optimizer"])
            else:
                trainer.optimizer.load_state_dict(loaded["optimizer"])
    torch.random.set_rng_state(
        torch.frombuffer(bytearray(base64.b64decode(state.torch_rng)), dtype=torch.uint8)
    )
    return state


def _raise_together(groups: Groups, problem: tuple[str, str] | None) -> None:
    """Raise the problem that any rank found on every rank; collective over the world.

    If the ranks found several, a newer checkpoint comes first, then an unreadable one, then a damaged one.
    """
    problems = dict(each for each in groups.gather_objects(problem) if each is not None)
    for kind in (NewerCheckpoint, UnreadableCheckpoint, CheckpointError):
        if kind.__name__ in problems:
            raise kind(problems[kind.__name__])


@contextmanager
def _failing_late() -> Iterator[None]:
    """Delay exceptions from Megatron's writing of small files on this rank until the end of the block.

    All ranks meet in collectives between those writes: a rank that left early would block the others.
    """
    failures: list[Exception] = []
    writers = [
        COMMON_STATE_WRITER,
        (filesystem_async.FileSystemWriterAsync, "prepare_local_plan"),
        (filesystem_async.FileSystemWriterAsync, "finish"),
        (serialization, "save_config"),
    ]

    def held(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                return write(*arguments)
            except Exception as error:
                failures.append(error)
            return arguments[-1]  # a plan is returned unchanged; the other writers return nothing

        return call

    originals = [getattr(owner, name) for owner, name in writers]
    for (owner, name), write in zip(writers, originals, strict=True):
        setattr(owner, name, held(write))
    try:
        yield
    finally:
        for (owner, name), write in zip(writers, originals, strict=True):
            setattr(owner, name, write)
    if failures:
        raise failures[0]


def sharded_state(trainer: Trainer, *, is_loading: bool) -> dict[str, Any]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    model = trainer.ddp.module.sharded_state_dict(metadata={"dp_cp_group": group})
    # The layers' extra state (fp8 scales) is left out: it is stored as pickles, which a load would have to
    # execute.
    model = {name: value for name, value in model.items() if not name.endswith(_EXTRA_STATE)}
    if trainer.policy.adapters is not None:  # the frozen weights are those of the model folder
        model = {name: value for name, value in model.items() if name.startswith(f"{ADAPTERS}.")}
    if trainer.config.optimizer.distributed:
        optimizer = sharded_optimizer(trainer.optimizer, model)
        return {
            "model": model if is_loading else sharded_weights(trainer.optimizer, model),
            "optimizer": optimizer,
        }
    return {
        "model": model,
        "optimizer": trainer.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=_WHOLE_STATE
        ),
    }
