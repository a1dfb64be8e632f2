"""Run a function on several ranks: processes forked from one warm parent, joined over gloo on a free loopback
port."""

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_PRELOAD = ["tests.helpers.warm"]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOAD)


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 240.0
) -> list[Any]:
    """Call `function(*arguments)` on `world_size` ranks with torchrun's environment and return their results
    in rank order.

    `function` must be importable (top level of a module); results travel pickled. Raises RuntimeError with
    the traceback of the first rank that fails, and TimeoutError naming the ranks that did not answer; the
    others are killed either way.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, results = [], {}
    pending: dict[Connection, int] = {}
    try:
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_run_rank, args=(rank, world_size, port, sender, function, arguments), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            pending[receiver] = rank
        while pending:
            ready = wait(list(pending), timeout=timeout)
            if not ready:
                raise TimeoutError(f"no answer from ranks {sorted(pending.values())} in {timeout:g} s")
            for receiver in ready:
                rank = pending.pop(receiver)  # type: ignore[arg-type]
                try:
                    succeeded, value = pickle.loads(receiver.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    processes[rank].join(5)
                    raise RuntimeError(
                        f"rank {rank} died with exit code {processes[rank].exitcode}"
                    ) from None
                if not succeeded:
                    raise RuntimeError(f"rank {rank} failed:\n{value}")
                results[rank] = value
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    return [results[rank] for rank in range(world_size)]


def _run_rank(
    rank: int,
    world_size: int,
    port: int,
    sender: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # a checkpoint is written by children
    try:
        answer = (True, function(*arguments))
    except BaseException:
        answer = (False, traceback.format_exc())
    sender.send_bytes(
        pickle.dumps(answer)
    )  # plain bytes: multiprocessing would share tensors with a process that is gone
    sender.close()
    os._exit(0)  # no teardown: process groups and engine threads of a test have nothing left to say
