"""Measure the memory of trainer and engine at every phase boundary of a step and warn of memory leaks."""

from rlsc_mcore.observability.memory_pools import STEPS_OF_GROWTH, Table, growth_warnings, worst_of
from rlsc_mcore.parallel.backend import Backend
from rlsc_mcore.parallel.groups import Groups
from rlsc_mcore.rollout.engine import RolloutEngine
from rlsc_mcore.training.step import Trainer


class MemoryLedger:
    """Keep the memory table of the current step and those of recent steps, which show growth.

    See `observability.memory_pools` for the tables.
    """

    def __init__(self, trainer: Trainer, engine: RolloutEngine | None, backend: Backend) -> None:
        """`engine` is None in a run that samples no answer."""
        self._trainer, self._engine, self._backend = trainer, engine, backend
        self._graph_pool = None if engine is None else engine.graph_pool()
        self._table: Table = {}
        self._history: list[Table] = []  # of this process only: others are not comparable

    def measure(self, border: str) -> None:
        """Measure all memory at the phase boundary `border`.

        A later call for the same boundary replaces the row.
        """
        trainer = self._trainer.memory()
        engine = {} if self._engine is None else self._engine.memory(trainer["weights"].keys())
        self._table[border] = self._backend.account_memory({**trainer, **engine}, self._graph_pool)

    def close_step(self, groups: Groups) -> tuple[Table, list[str]]:
        """Return the step's table and a warning for every pool that grows; collective over the world.

        Each entry of the table is that of the fullest rank.
        """
        table = worst_of(groups.gather_objects(self._table))
        self._table = {}
        self._history = [*self._history[-STEPS_OF_GROWTH:], table]
        return table, growth_warnings(self._history)
