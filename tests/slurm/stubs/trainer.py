"""Stand in for `rlsc train` where a test is about what lies around it: the launch scripts, srun, the queue.

stubs/python, the PYTHON of such a job, runs this instead of the trainer and the real interpreter for
everything else. STUB_TRAINER has one word per attempt (the last one counts for all further attempts):

    done        end well                            stopped     end as after a request to stop, with nothing new saved
    saved       the same with a new checkpoint      exitN       exit with code N
    holdN       wait until the run folder has a file "go", then exit with code N
"""

import os
import socket
import sys
import time
from pathlib import Path

from rlsc_mcore.run.status import RunStatus, write_end

attempt, rank = int(os.environ["RLSC_ATTEMPT"]), int(os.environ["RANK"])
run_dir = Path(sys.argv[sys.argv.index("--run-dir") + 1])
actions = os.environ["STUB_TRAINER"].split()
action = actions[min(attempt, len(actions) - 1)]
names = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
)
print(
    "stub on", socket.gethostname(), {name: os.environ.get(name) for name in names}, *sys.argv[1:], flush=True
)
RunStatus(run_dir, 4, enabled=rank == 0)
if action.startswith("hold"):
    while not (run_dir / "go").exists():
        time.sleep(0.1)
if action == "saved" and rank == 0:
    (run_dir / "checkpoints").mkdir(exist_ok=True)
    (run_dir / "checkpoints" / "latest").write_text(f"step_{attempt + 1:06d}\n")
if action.startswith(("hold", "exit")):
    sys.exit(int(action[4:]))
if rank == 0:
    write_end(run_dir, "done" if action == "done" else "stopped")
