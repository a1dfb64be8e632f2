# shellcheck shell=bash
# The body of the launch scripts: checks, ranks, signals, endings. Sourced, never run; docs/cluster.md says how to use it.
#
# Settings, all optional, from the environment:
#   MODEL DATA TP RUN_DIR         model.path, data.path, parallel.tp, run_dir (default: runs/<job name> where you submit, so that
#                                 the same command goes on where the last job stopped)
#   RLSC_CONFIG                   configuration file instead of the recipe's
#   PYTHON                        interpreter (default: .venv/bin/python of the checkout, else python3)
#   GPUS_PER_NODE NPROC_PER_NODE  GPUs wanted on each node, ranks on each node (default: one per GPU)
#   GPU_MEMORY_GIB                memory of one GPU; with it the plan warns of what will not fit (the counts of `rlsc plan`)
#   MASTER_PORT                   rendezvous port (default: from the job's id and attempt)
#   CONTAINER MOUNTS              image to run in: a file *.sif by apptainer, anything else by pyxis; extra mounts A:B,C:D
#   RLSC_MAX_RESTARTS             restarts after crashes that had made progress (3)
#   RLSC_MIN_FREE_GB              free space wanted in the run folder on every node (1)
#   RLSC_CHECK_IMPORTS            1: every node imports torch, Megatron-Core and vLLM once before the ranks start (10 s of processor time,
#                                 more from a cold file system; the ranks then find them cached). 0: the packages are only looked up
#   RLSC_CHECK_TIMEOUT_S          seconds after which the check of a node has failed (300)
#   RLSC_ROOT                     the checkout, where the script cannot find it

rlsc_say() { printf '[rlsc %s] %s\n' "$(date +%T)" "$*"; }
rlsc_die() {
    printf 'rlsc: error: %s\n' "$*" >&2
    exit 2
}

# rlsc_launch --nodes N --gpus-per-node G --config FILE -- [--dry-run] TRAINER ARGUMENTS: everything, from checks to exit.
rlsc_launch() {
    local nodes=$2 gpus=$4 config=$6 dry=""
    shift 7
    if [[ ${1:-} == --dry-run ]]; then
        dry=1
        shift
    fi
    source "$RLSC_ROOT/launch/env.sh"
    job=${SLURM_JOB_ID:-}
    attempt=${SLURM_RESTART_COUNT:-0}
    nodes=${SLURM_JOB_NUM_NODES:-$nodes}
    # What was asked for (TYPE:COUNT too): an exclusive node has all its GPUs in SLURM_GPUS_ON_NODE, but its steps only these.
    gpus=${GPUS_PER_NODE:-${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-$gpus}}}
    gpus=${gpus##*:}
    local ranks=${NPROC_PER_NODE:-$gpus}
    [[ $gpus =~ ^[0-9]+$ ]] || rlsc_die "GPUS_PER_NODE: expected a number, got '$gpus'"
    [[ $ranks =~ ^[1-9][0-9]*$ ]] || rlsc_die "NPROC_PER_NODE: expected ranks per node, at least 1, got '$ranks'"
    [[ ${GPU_MEMORY_GIB:-1} =~ ^[0-9]*[1-9][0-9]*(\.[0-9]+)?$ ]] || rlsc_die "GPU_MEMORY_GIB: expected GiB, more than 0, got '$GPU_MEMORY_GIB'"
    _rlsc_trainer_arguments "$config" "$@"
    _rlsc_containers
    export PYTHONPATH=$RLSC_ROOT${PYTHONPATH:+:$PYTHONPATH}

    _rlsc_check_input "$nodes" "$ranks"
    _rlsc_rendezvous
    _rlsc_print_plan "$nodes" "$gpus" "$ranks"
    if [[ -n $dry ]]; then return; fi
    if [[ -z $job ]]; then
        rlsc_die "not in a SLURM job: submit with sbatch, or try --dry-run; without SLURM: torchrun --nproc-per-node $ranks -m rlsc_mcore.cli train ..."
    fi

    stop="" # requeue | quit | dying
    trap 'stop=requeue; rlsc_say "USR1: the time limit is near; saving, then back into the queue"; _rlsc_relay' USR1
    trap 'stop=quit; rlsc_say "USR2: saving, then stopping for good"; _rlsc_relay' USR2
    trap 'stop=dying; rlsc_say "TERM: SLURM is ending this job"' TERM
    _rlsc_claim_run_dir
    trap _rlsc_settle_unstarted EXIT
    _rlsc_record
    _rlsc_check_nodes "$nodes" "$gpus"
    if [[ -n $stop ]]; then _rlsc_end_stopped "before anything was started"; fi
    _rlsc_run "$nodes" "$ranks"
    _rlsc_end
}

# ------------------------------------------------------------------------------------------------ what is to be run

_rlsc_trainer_arguments() { # CONFIG ARGUMENTS...: environment first, so that an argument wins
    local config=$1
    shift
    trainer=()
    if [[ " $* " != *" --resume"[=\ ]* ]]; then
        trainer+=(--config "${RLSC_CONFIG:-$config}")
        trainer+=(--run-dir "${RUN_DIR:-${SLURM_SUBMIT_DIR:-$PWD}/runs/${SLURM_JOB_NAME:-$(basename "$0" .sh)}}")
        if [[ -n ${MODEL:-} ]]; then trainer+=(--model.path "$MODEL"); fi
        if [[ -n ${DATA:-} ]]; then trainer+=(--data.path "$DATA"); fi
        if [[ -n ${TP:-} ]]; then trainer+=(--parallel.tp "$TP"); fi
    fi
    trainer+=("$@")
}

_rlsc_containers() {
    in_container=() # in front of a command inside a task
    srun_container=()
    host_python=${PYTHON:-}
    if [[ -z $host_python ]]; then
        host_python=$RLSC_ROOT/.venv/bin/python
        if [[ ! -x $host_python ]]; then host_python=$(command -v python3) || rlsc_die "no python3 in PATH; set PYTHON"; fi
    fi
    command -v "$host_python" >/dev/null || [[ -n ${CONTAINER:-} ]] || rlsc_die "PYTHON: no program $host_python"
    python=$host_python
    if [[ -z ${CONTAINER:-} ]]; then return; fi
    python=${PYTHON:-python3}
    local mounts="$RLSC_ROOT:$RLSC_ROOT,$PWD:$PWD${MOUNTS:+,$MOUNTS}"
    if [[ $CONTAINER == *.sif ]]; then
        in_container=(apptainer exec --nv --pwd "$PWD" --bind "$mounts" "$CONTAINER")
    else
        srun_container=("--container-image=$CONTAINER" "--container-mounts=$mounts" "--container-workdir=$PWD")
    fi
}

_rlsc_check_input() { # NODES RANKS: the trainer's own parser decides, without torch
    local name value facts checker=("$host_python")
    if ((${#in_container[@]})) && { [[ -n $job ]] || command -v "${in_container[0]}" >/dev/null; }; then checker=("${in_container[@]}" "$python"); fi
    if ((${#srun_container[@]})) && [[ -n $job ]]; then checker=(srun --nodes=1 --ntasks=1 "${srun_container[@]}" "$python"); fi
    facts=$("${checker[@]}" -m rlsc_mcore.planning.launch_checks --nodes "$1" --ranks-per-node "$2" \
        ${GPU_MEMORY_GIB:+"--gpu-memory-gib=$GPU_MEMORY_GIB"} -- "${trainer[@]}") || {
        if (($? != 2)); then rlsc_die "the checks could not run with ${checker[*]}: bash launch/install.sh makes an environment, or set PYTHON"; fi
        exit 2
    }
    plan=()
    while IFS=$'\t' read -r name value; do
        if [[ $name == run_dir ]]; then run_dir=$value; fi
        plan+=("$(printf '%-11s %s' "$name" "$value")")
    done <<<"$facts"
    # vLLM turns them off around its sleep pool only where PYTORCH_CUDA_ALLOC_CONF spells them exactly so.
    if [[ ${PYTORCH_CUDA_ALLOC_CONF:-}${PYTORCH_ALLOC_CONF:-} == *expandable_segments:[Tt]rue* ]]; then
        rlsc_say "warning: expandable_segments and the engine's sleep mode exclude each other; unset PYTORCH_CUDA_ALLOC_CONF"
    fi
}

_rlsc_rendezvous() {
    MASTER_ADDR=127.0.0.1
    if [[ -n $job ]]; then read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST"); fi
    # Below the ports that the system gives out; jobs that share a node differ, and so do attempts of one job.
    MASTER_PORT=${MASTER_PORT:-$((15000 + (${job:-0} * 10 + attempt) % 15000))}
    export MASTER_ADDR MASTER_PORT
}

_rlsc_print_plan() { # NODES GPUS RANKS
    local line variable
    rlsc_say "job ${job:-none}, attempt $attempt: $1 nodes x $3 ranks ($2 GPUs each), rendezvous at $MASTER_ADDR:$MASTER_PORT"
    for line in "${plan[@]}"; do rlsc_say "  $line"; done
    _rlsc_step "$1" "$3"
    rlsc_say "  step        $(printf '%q ' "${step[@]}")"
    rlsc_say "  each rank   $(printf '%q ' "${command[@]}")"
    for variable in $(compgen -e | grep -E '^(CUDA|NCCL|TORCH_NCCL|VLLM|RLSC|GLOO|OMP)_' | grep -v '^RLSC_ROOT$'); do
        rlsc_say "  env         $variable=${!variable}"
    done
}

# What starts the ranks, and what each of them is.
_rlsc_step() { # NODES RANKS_PER_NODE
    local cpus=$((${SLURM_CPUS_ON_NODE:-$2} / $2))
    step=(srun --nodes="$1" --ntasks="$(($1 * $2))" --ntasks-per-node="$2" --cpus-per-task="$((cpus > 0 ? cpus : 1))" --cpu-bind=none
        --mpi=none --kill-on-bad-exit=1 --wait=60 ${srun_container[@]+"${srun_container[@]}"})
    command=(${in_container[@]+"${in_container[@]}"} "$python" -m rlsc_mcore.cli train "${trainer[@]}")
}

# ------------------------------------------------------------------------------------------------ before the ranks start

_rlsc_claim_run_dir() {
    mkdir -p "$run_dir/logs" || rlsc_die "run_dir: $run_dir cannot be made"
    local owner=""
    if [[ -f $run_dir/.owner ]]; then read -r owner <"$run_dir/.owner" || true; fi
    if [[ -n $owner && $owner != "$job" && -n $(squeue --noheader --jobs "$owner" --states RUNNING,COMPLETING,SUSPENDED 2>/dev/null) ]]; then
        rlsc_die "run_dir: job $owner is running in $run_dir; wait for it (squeue -j $owner) or choose another RUN_DIR"
    fi
    echo "$job" >"$run_dir/.owner"
    export RLSC_ATTEMPT=$attempt RLSC_LOGS=$run_dir/logs/$job.$attempt
    rm -rf "$RLSC_LOGS"
    mkdir -p "$RLSC_LOGS"
    rm -f "$run_dir/ending.json" # an earlier attempt's
    ln -sfn "$job.$attempt" "$run_dir/logs/latest"
    printf '{\n "state": "launching",\n "phase": "node checks",\n "job": "%s",\n "attempt": %d,\n "host": "%s",\n "updated": %s\n}\n' \
        "$job" "$attempt" "$(hostname)" "$(date +%s)" >"$run_dir/status.json.launching"
    mv "$run_dir/status.json.launching" "$run_dir/status.json"
}

_rlsc_record() { # what is needed to run it again
    {
        printf '# submitted from %s\n' "${SLURM_SUBMIT_DIR:-$PWD}"
        scontrol show job "$job" | sed -n 's/^ *Command=/# script: /p'
        printf '%q ' "${command[@]}"
        printf '\n'
    } >"$RLSC_LOGS/command.txt"
    compgen -e | grep -E '^(CUDA|NCCL|TORCH|VLLM|RLSC|GLOO|OMP|SLURM|SBATCH|MASTER|PYTORCH|HF_HUB_OFFLINE)' |
        while read -r name; do printf '%s=%q\n' "$name" "${!name}"; done >"$RLSC_LOGS/environment.txt"
    scontrol show hostnames "$SLURM_JOB_NODELIST" >"$RLSC_LOGS/hosts.txt"
    {
        git -C "$RLSC_ROOT" rev-parse HEAD && git -C "$RLSC_ROOT" status --short
    } >"$RLSC_LOGS/git.txt" 2>&1 || true
    git -C "$RLSC_ROOT" diff HEAD >"$RLSC_LOGS/git.diff" 2>/dev/null || true
    "$host_python" -c 'import importlib.metadata as m, sys
print("python", sys.version.split()[0])
for name in sorted({f"{d.name}=={d.version}" for d in m.distributions()}, key=str.lower): print(name)' >"$RLSC_LOGS/packages.txt" 2>&1 || true
}

_rlsc_check_nodes() { # NODES GPUS
    local status=0 seconds=${RLSC_CHECK_TIMEOUT_S:-300}
    [[ $seconds =~ ^[1-9][0-9]*$ ]] || rlsc_die "RLSC_CHECK_TIMEOUT_S: expected seconds, at least 1, got '$seconds'"
    rlsc_say "checking $1 nodes: checkout, run folder, GPUs, imports, disk"
    echo "$job.$attempt" >"$run_dir/.canary"
    timeout "$((seconds + 60))" srun --nodes="$1" --ntasks="$1" --ntasks-per-node=1 --mpi=none ${srun_container[@]+"${srun_container[@]}"} \
        bash -c 'if [[ ! -r $1 ]]; then echo "rlsc: error: $(hostname): no $1 here; the checkout must be on a shared file system" >&2; exit 2; fi
            source "$1" && shift && rlsc_check_node "$@"' _ "$RLSC_ROOT/launch/lib.sh" \
        "$run_dir" "$job.$attempt" "$2" "${RLSC_MIN_FREE_GB:-1}" "${RLSC_CHECK_IMPORTS:-1}" "$seconds" ${in_container[@]+"${in_container[@]}"} "$python" || status=$?
    case $status in
        0) ;;
        2) exit 2 ;;
        124) rlsc_die "a node did not answer within $((seconds + 60)) s; srun -w NODE hostname finds it" ;;
        *)
            if [[ -n $stop ]]; then return; fi
            rlsc_say "the node checks were ended (exit $status)"
            _rlsc_requeue "nothing was started" || exit 75
            ;;
    esac
}

# What a Python cannot import, and why; nothing where all is well. In one process, as a rank does it: libraries can break each other.
_rlsc_broken_import() { # IMPORTS SECONDS PYTHON...
    local imports=$1 seconds=$2 code=0 output
    shift 2
    output=$(timeout "$seconds" "$@" -c 'import importlib, importlib.util, os, sys
def broken(text):
    print("broken:", text, flush=True)
    os._exit(3)
names = ("torch", "transformers", "megatron.core", "vllm", "rlsc_mcore")
missing = [name for name in names if importlib.util.find_spec(name.split(".")[0]) is None]
if missing: broken(" ".join(missing) + ": not installed")
for name in names if sys.argv[1] == "1" else ():
    try:
        getattr(importlib.import_module(name), "LLM" if name == "vllm" else "__name__")  # vllm imports its parts when they are named
    except BaseException as error: broken(f"{name}: {type(error).__name__}: " + " ".join(str(error).split())[:300])
os._exit(0)' "$imports" 2>&1) || code=$?
    case $code in
        0) ;;
        3) sed -n 's/^broken: //p' <<<"$output" ;;
        124) echo "torch, megatron.core and vllm within $seconds s (RLSC_CHECK_TIMEOUT_S)" ;;
        *) echo "any package: exit code $code, $(tail -n 1 <<<"$output")" ;;
    esac
}

# In a task on every node: RUN_DIR CANARY GPUS FREE_GB IMPORTS SECONDS PYTHON...; one line per fault, with the node's name.
rlsc_check_node() {
    local run_dir=$1 canary=$2 gpus=$3 free_gb=$4 imports=$5 seconds=$6 bad=0 visible free broken host
    host=$(hostname)
    shift 6
    fault() {
        printf 'rlsc: error: %s: %s\n' "$host" "$*" >&2
        bad=2
    }
    if [[ $(cat "$run_dir/.canary" 2>/dev/null) != "$canary" ]]; then
        fault "run_dir $run_dir is not the folder that the first node sees; choose one on a shared file system"
    else
        free=$(($(df --output=avail -B 1000000000 "$run_dir" | tail -n 1)))
        if ((free < free_gb)); then fault "$free GB free in $run_dir, $free_gb wanted (RLSC_MIN_FREE_GB)"; fi
    fi
    if ((gpus)); then
        if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
            visible=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .) || true
        else
            visible=$(nvidia-smi -L 2>/dev/null | grep -c .) || true
        fi
        if ((visible < gpus)); then
            fault "$visible GPUs visible, $gpus wanted (CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-unset}); see sbatch --gpus-per-node and GPUS_PER_NODE"
        fi
    fi
    broken=$(_rlsc_broken_import "$imports" "$seconds" "$@")
    if [[ -n $broken ]]; then fault "$* cannot import $broken; install on a shared file system (bash launch/install.sh) or set PYTHON"; fi
    return "$bad"
}

# ------------------------------------------------------------------------------------------------ the ranks

_rlsc_run() { # NODES RANKS_PER_NODE
    local code=0
    checkpoint_before=$(_rlsc_checkpoint)
    rlsc_say "starting $(($1 * $2)) ranks; logs: $RLSC_LOGS/rank_*.log"
    "${step[@]}" bash -c 'source "$1" && shift && rlsc_rank "$@"' _ "$RLSC_ROOT/launch/lib.sh" "${command[@]}" &
    step_pid=$!
    while :; do # a trapped signal ends `wait` early: the step goes on
        code=0
        wait "$step_pid" || code=$?
        kill -0 "$step_pid" 2>/dev/null || break
    done
    srun_code=$code
    if [[ -n ${relay_pid:-} ]]; then kill "$relay_pid" 2>/dev/null || true; fi
}

# In every task: become a rank and run COMMAND... Signals that ask for a save must not end this shell, nor the trainer before it listens.
rlsc_rank() {
    trap '' USR1 USR2 TERM
    local code=0
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%[(,]*}
    if ((RANK == 0)); then
        echo "$SLURM_STEP_ID" >"$RLSC_LOGS/step.partial" && mv "$RLSC_LOGS/step.partial" "$RLSC_LOGS/step"
        exec > >(exec tee -a "$RLSC_LOGS/rank_$RANK.log") 2>&1 # tee inherits the ignored signals
    else
        exec >>"$RLSC_LOGS/rank_$RANK.log" 2>&1
    fi
    "$@" || code=$?
    if ((code)); then
        # The first rank that fails is the cause; srun's own code is that of the ranks which it then kills.
        (set -o noclobber && echo "$code $RANK $(hostname)" >"$RLSC_LOGS/first_failure") 2>/dev/null || true
    fi
    exit "$code"
}

# Ask the ranks to save, again every few seconds until they have left: one that is just starting may not listen yet.
_rlsc_relay() {
    if [[ -z ${step_pid:-} || -n ${relay_pid:-} ]]; then return 0; fi
    (
        trap - USR1 USR2 TERM
        while kill -0 "$step_pid" 2>/dev/null; do
            if [[ -f $RLSC_LOGS/step ]]; then scancel --signal=USR1 "$job.$(<"$RLSC_LOGS/step")" 2>/dev/null; fi
            sleep 5
        done
    ) </dev/null >/dev/null 2>&1 &
    relay_pid=$!
}

# ------------------------------------------------------------------------------------------------ how it ended

_rlsc_status() { sed -n "s/^ \"$1\": \"\{0,1\}\([^\",]*\).*/\1/p" "$run_dir/status.json" 2>/dev/null | head -n 1; }
_rlsc_checkpoint() { cat "$run_dir/checkpoints/latest" 2>/dev/null || echo none; }

# The status must tell how the job ended also where no rank could; what a rank has said stays. Only once no rank writes.
_rlsc_settle_status() { # STATE [MESSAGE]
    case $(_rlsc_status state) in running | launching) ;; *) return 0 ;; esac
    if sed "s|^ \"state\": .*| \"state\": \"$1\",${2:+\\n \"message\": \"$2\",}|" "$run_dir/status.json" >"$run_dir/status.json.settled"; then
        mv "$run_dir/status.json.settled" "$run_dir/status.json"
    fi
}

_rlsc_settle_unstarted() { # at the exit of this script, when no rank was started
    case $? in
        0) _rlsc_settle_status stopped ;; # by request
        2) _rlsc_settle_status config "the node checks failed; the lines are in the job's output" ;;
        *) _rlsc_settle_status crash "ended during the node checks" ;;
    esac
}

_rlsc_end() {
    local state code="" rank="" host="" after crashes
    if [[ -f $RLSC_LOGS/first_failure ]]; then read -r code rank host <"$RLSC_LOGS/first_failure"; fi
    if [[ $stop == dying ]]; then
        _rlsc_settle_status crash "ended by SLURM before it could save"
    elif [[ -n $rank ]]; then
        _rlsc_settle_status crash "rank $rank on $host exited with code $code and could not say why; the end of its log is in the job's output"
    else
        _rlsc_settle_status crash "srun exited with code $srun_code; the lines are in the job's output"
    fi
    state=$(_rlsc_status state)
    after=$(_rlsc_checkpoint)
    rlsc_say "ended: $state, srun exit $srun_code, checkpoint $checkpoint_before -> $after"
    if [[ $state != "done" && $state != stopped && $state != config && -n $rank ]]; then
        rlsc_say "rank $rank on $host failed first, exit $code; the end of $RLSC_LOGS/rank_$rank.log:"
        tail -n 15 "$RLSC_LOGS/rank_$rank.log" 2>/dev/null | sed 's/^/    /' || true
    fi
    case $state in
        "done") exit 0 ;;
        config) exit 2 ;;
        stopped) _rlsc_end_stopped "$([[ $after == none ]] && echo "nothing trained yet" || echo "saved at $after")" ;;
    esac
    if [[ $stop == dying ]]; then exit 143; fi
    crashes=$(find "$run_dir/logs" -path "*/$job.*/requeued_after_crash" | wc -l)
    if [[ $after == "$checkpoint_before" ]]; then
        rlsc_say "not requeued: no checkpoint since this attempt began, so it would fail again"
    elif ((crashes >= ${RLSC_MAX_RESTARTS:-3})); then
        rlsc_say "not requeued: crashed $((crashes + 1)) times (RLSC_MAX_RESTARTS=${RLSC_MAX_RESTARTS:-3})"
    else
        : >"$RLSC_LOGS/requeued_after_crash"
        _rlsc_requeue "crashed, but the run had moved on" || true
    fi
    if [[ -z $code || $code == 0 ]]; then code=$srun_code; fi
    exit "$((code ? code : 1))"
}

_rlsc_end_stopped() { # WHAT
    case $stop in
        quit) exit 0 ;;
        dying) exit 143 ;; # scancel, or SLURM's own requeue: never second-guess it
    esac
    _rlsc_requeue "$1" || exit 75
}

_rlsc_requeue() { # WHY: does not return, unless SLURM refuses
    rlsc_say "back into the queue: $1"
    if scontrol requeue "$job"; then
        trap 'exit 0' TERM # SLURM ends this script now
        sleep 60 &
        wait $! || true
        exit 0
    fi
    rlsc_say "SLURM does not requeue this job (--no-requeue?): submit the same command again to go on in $run_dir"
    return 1
}
