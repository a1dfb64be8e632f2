"""The hand-over of memory between trainer and engine, measured at every border of a step's phases."""

from rlsc_mcore.observability.memory_pools import STEPS_OF_GROWTH, Table, residue_warnings, worst_of
from rlsc_mcore.parallel.backend import Backend
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.rollout.engine import RolloutEngine
from rlsc_mcore.training.step import Trainer


class MemoryLedger:
    """This step's table (see `observability.memory`), and those of the steps before that a growth is judged
    by."""

    def __init__(self, trainer: Trainer, engine: RolloutEngine, backend: Backend) -> None:
        self._trainer, self._engine, self._backend = trainer, engine, backend
        self._graph_pool = engine.graph_pool()
        self._table: Table = {}
        self._history: list[Table] = []  # of this process: another one's memory is not comparable

    def measure(self, border: str) -> None:
        """Account for all memory at `border`; a later call for the same border replaces it."""
        trainer = self._trainer.memory()
        engine = self._engine.memory(trainer["weights"].keys())
        self._table[border] = self._backend.account_memory({**trainer, **engine}, self._graph_pool)

    def close_step(self, groups: Groups) -> tuple[Table, list[str]]:
        """Return the step's table of the fullest rank, pool by pool, and what grows; collective over the
        world."""
        table = worst_of(groups.gather_objects(self._table))
        self._table = {}
        self._history = [*self._history[-STEPS_OF_GROWTH:], table]
        return table, residue_warnings(self._history)
