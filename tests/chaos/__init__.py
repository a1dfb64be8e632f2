"""Chaos: faults at random places and times; every run must end, after resuming, as the run that nothing
disturbed ended.

    bash launch/test.sh -m chaos tests/chaos                                        a few minutes, as in .ci/run
    bash launch/test.sh -m chaos tests/chaos --chaos-minutes 480 --chaos-seed 7     a night

Each round's seed is printed; `--chaos-seed` starts from it, so that a round that failed comes first.
`python -m tests.chaos.node_kill` measures on a local SLURM how long a run is held up by a node that dies.
"""
