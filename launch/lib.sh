# shellcheck shell=bash
# Shared code of the launch scripts: settings, plan, checks, ranks, signals. Sourced, never run;
# docs/cluster.md describes its use. launch/job.sh has the functions for the SLURM job (owner, records,
# requeue), launch/node.sh the functions that run in its tasks.
#
# Settings, all optional, from the environment:
#   MODEL DATA TP RUN_DIR         model.path, data.path, parallel.tp, run_dir (default: runs/<job name> in the folder of submission,
#                                 so that the same command continues the last job's run; in an array runs/<job name>_<task>)
#   RLSC_CONFIG                   configuration file instead of the recipe's
#   PYTHON                        interpreter (default: .venv/bin/python of the checkout, or the Python that the wheel is installed
#                                 in; else python3)
#   GPUS_PER_NODE NPROC_PER_NODE  GPUs required on each node, ranks on each node (default: one per GPU)
#   GPU_MEMORY_GIB                memory of one GPU; if set, the plan warns when the run does not fit (by the numbers of `rlsc plan`)
#   MASTER_PORT                   rendezvous port (default: from the job's id and attempt)
#   CONTAINER MOUNTS              image to run in: *.sif with apptainer, any other with pyxis; extra mounts A:B,C:D
#   RLSC_MAX_RESTARTS             restarts after crashes that wrote a checkpoint, and after checks that were cut off (3)
#   RLSC_MAX_FRUITLESS            consecutive attempts that may end without a new checkpoint, for any reason (10)
#   RLSC_MIN_FREE_GB              free space required in the run folder on every node (1)
#   RLSC_CHECK_IMPORTS            1: every node imports torch, Megatron-Core and vLLM once before the ranks start (10 s of CPU time, more
#                                 from a cold file system; the ranks then read cached files). 0: only check that the packages exist
#   RLSC_CHECK_TIMEOUT_S          seconds after which the check of a node fails, or SLURM counts as not answering (300)
#   RLSC_ROOT                     the checkout, or the package's folder of an installed wheel, if the script cannot find it
#
# In an array, %a in the trainer's arguments and in RUN_DIR is replaced by the task:
#   sbatch --array=0-3 launch/rlsc_7b.sh --seed %a

source "$(dirname "${BASH_SOURCE[0]}")/python.sh"
source "$RLSC_ROOT/launch/job.sh"

rlsc_say() { printf '[rlsc %s] %s\n' "$(date +%T)" "$*"; }
rlsc_die() {
    printf 'rlsc: error: %s\n' "$*" >&2
    exit 2
}

# Read a whole-number setting into a variable; exit with code 2 if it is not one.
_rlsc_number() { # NAME UNIT LEAST DEFAULT VARIABLE
    local value=${!1:-$4}
    if [[ ! $value =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((value < $3)); then rlsc_die "$1: expected $2, at least $3, got '$value'"; fi
    printf -v "$5" %s "$value"
}

# rlsc_launch --nodes N --gpus-per-node G --config FILE -- [--dry-run] TRAINER ARGUMENTS: run the whole job,
# from checks to exit.
rlsc_launch() {
    local nodes=$2 gpus=$4 config=$6 dry="" checks_status=0
    shift 7
    if [[ ${1:-} == --dry-run ]]; then
        dry=1
        shift
    fi
    _rlsc_number RLSC_CHECK_TIMEOUT_S seconds 1 300 check_timeout_s
    _rlsc_number RLSC_MAX_RESTARTS restarts 0 3 max_restarts
    _rlsc_number RLSC_MAX_FRUITLESS attempts 1 10 max_fruitless
    _rlsc_number RLSC_MIN_FREE_GB GB 0 1 min_free_gb
    [[ ${RLSC_CHECK_IMPORTS:-1} == [01] ]] || rlsc_die "RLSC_CHECK_IMPORTS: expected 0 or 1, got '$RLSC_CHECK_IMPORTS'"
    source "$RLSC_ROOT/launch/env.sh"
    _rlsc_identify_job
    if [[ -n $job ]]; then
        nodes=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-}}
        [[ -n $nodes ]] || rlsc_die "SLURM_JOB_NUM_NODES: SLURM did not say how many nodes job $job has"
    fi
    gpus=${GPUS_PER_NODE:-$(_rlsc_gpus_per_node "$gpus")}
    # An exclusive node may have more GPUs than requested; the step gets the requested number.
    srun_gpus=$(_rlsc_asked_gpus)
    srun_gpus=${srun_gpus:+--gpus-per-node=$srun_gpus}
    local ranks=${NPROC_PER_NODE:-$gpus}
    [[ $gpus =~ ^(0|[1-9][0-9]*)$ ]] || rlsc_die "GPUS_PER_NODE: expected a number, got '$gpus'"
    [[ $ranks =~ ^[1-9][0-9]*$ ]] || rlsc_die "NPROC_PER_NODE: expected ranks per node, at least 1, got '$ranks'"
    [[ ${MASTER_PORT:-1} =~ ^[1-9][0-9]*$ ]] && ((${MASTER_PORT:-1} < 65536)) || rlsc_die "MASTER_PORT: expected a port, got '$MASTER_PORT'"
    _rlsc_forget_inherited_options
    [[ ${GPU_MEMORY_GIB:-1} =~ ^[0-9]*[1-9][0-9]*(\.[0-9]+)?$ ]] || rlsc_die "GPU_MEMORY_GIB: expected GiB, more than 0, got '$GPU_MEMORY_GIB'"
    _rlsc_trainer_arguments "$config" "$@"
    _rlsc_containers

    _rlsc_check_input "$nodes" "$ranks"
    _rlsc_rendezvous "$nodes"
    _rlsc_print_plan "$nodes" "$gpus" "$ranks"
    if [[ -n $dry ]]; then return "$checks_status"; fi
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

# ------------------------------------------------------------------------------------------------ commands and checks of input

_rlsc_trainer_arguments() { # CONFIG ARGUMENTS...: environment first, so that an argument wins
    local config=$1
    shift
    trainer=()
    if [[ " $* " != *" --resume"[=\ ]* ]]; then
        trainer+=(--config "${RLSC_CONFIG:-$config}")
        trainer+=(--run-dir "${RUN_DIR:-${SLURM_SUBMIT_DIR:-$PWD}/runs/${SLURM_JOB_NAME:-$(basename "$0" .sh)}${task:+_$task}}")
        if [[ -n ${MODEL:-} ]]; then trainer+=(--model.path "$MODEL"); fi
        if [[ -n ${DATA:-} ]]; then trainer+=(--data.path "$DATA"); fi
        if [[ -n ${TP:-} ]]; then trainer+=(--parallel.tp "$TP"); fi
    fi
    trainer+=("$@")
    if [[ -n $task ]]; then trainer=("${trainer[@]//%a/$task}"); fi
}

_rlsc_containers() {
    in_container=() # in front of a command inside a task
    srun_container=()
    [[ -n $host_python ]] || rlsc_die "no python3 in PATH; set PYTHON"
    command -v "$host_python" >/dev/null || [[ -n ${CONTAINER:-} ]] || rlsc_die "PYTHON: no program $host_python"
    python=$host_python
    if [[ -z ${CONTAINER:-} ]]; then return; fi
    python=${PYTHON:-python3}
    local path mounts="$RLSC_ROOT:$RLSC_ROOT,$PWD:$PWD"
    for path in "${MODEL:-}" "${DATA:-}" "${RUN_DIR:-}"; do # what the settings name must be there inside too
        if [[ $path == "${RUN_DIR:-}" && ! -e $path ]]; then path=$(dirname "$path"); fi
        if [[ $path == /*/* && -e $path ]]; then mounts+=",$path:$path"; fi
    done
    mounts+=${MOUNTS:+,$MOUNTS}
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
        ${GPU_MEMORY_GIB:+"--gpu-memory-gib=$GPU_MEMORY_GIB"} ${dry:+--downloads} -- "${trainer[@]}") || {
        local code=$?
        if ((code != 2)); then
            rlsc_die "the checks could not run with ${checker[*]} (exit $code): ${CONTAINER:+look at CONTAINER=$CONTAINER and MOUNTS, or }bash launch/install.sh makes an environment, or set PYTHON"
        fi
        if [[ -z $dry || -z $facts ]]; then exit 2; fi
        checks_status=2 # a dry run prints the whole plan also where a check failed
    }
    plan=()
    while IFS=$'\t' read -r name value; do
        if [[ $name == run_dir ]]; then run_dir=$value; fi
        plan+=("$(printf '%-11s %s' "$name" "$value")")
    done <<<"$facts"
    # vLLM disables them around its sleep pool only if PYTORCH_CUDA_ALLOC_CONF has exactly this spelling.
    if [[ ${PYTORCH_CUDA_ALLOC_CONF:-}${PYTORCH_ALLOC_CONF:-} == *expandable_segments:[Tt]rue* ]]; then
        rlsc_say "warning: expandable_segments and the engine's sleep mode exclude each other; unset PYTORCH_CUDA_ALLOC_CONF"
    fi
}

_rlsc_rendezvous() { # NODES
    MASTER_ADDR=127.0.0.1 # one node: nobody else need reach it
    if (($1 > 1)) && [[ -n $job ]]; then
        read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST") || rlsc_die "SLURM_JOB_NODELIST: '$SLURM_JOB_NODELIST' names no host"
    fi
    # The port is below the system's ephemeral ports. It differs between jobs on a node, attempts of a job and
    # tasks of an array.
    MASTER_PORT=${MASTER_PORT:-$((15000 + (${SLURM_JOB_ID:-0} * 10 + attempt) % 15000))}
    export MASTER_ADDR MASTER_PORT
}

_rlsc_print_plan() { # NODES GPUS RANKS
    local line
    rlsc_say "job ${job:-none}, attempt $attempt: $1 nodes x $3 ranks ($2 GPUs each), rendezvous at $MASTER_ADDR:$MASTER_PORT"
    for line in "${plan[@]}"; do rlsc_say "  $line"; done
    _rlsc_step "$1" "$3"
    rlsc_say "  step        $(printf '%q ' "${step[@]}")"
    rlsc_say "  each rank   $(printf '%q ' "${command[@]}" | _rlsc_without_secrets)"
    while IFS= read -r line; do rlsc_say "  env         $line"; done < <(_rlsc_variables '^(CUDA|NCCL|TORCH_NCCL|VLLM|RLSC|GLOO|OMP)_' %s | grep -v '^RLSC_ROOT=')
}

# Set step, the srun command that starts the ranks, and command, the command of each rank.
_rlsc_step() { # NODES RANKS_PER_NODE
    local cpus overcommit=()
    cpus=$(_rlsc_least_cpus)
    cpus=$((${cpus:-$2} / $2))
    if ((cpus == 0)); then
        rlsc_say "warning: a node has fewer CPUs than ranks; they share them (sbatch --cpus-per-task gives more)"
        cpus=1 overcommit=(--overcommit)
    fi
    step=(srun --nodes="$1" --ntasks="$(($1 * $2))" --ntasks-per-node="$2" --cpus-per-task="$cpus" ${overcommit[@]+"${overcommit[@]}"} ${srun_gpus:+"$srun_gpus"} --cpu-bind=none
        --mpi=none --kill-on-bad-exit=1 --wait=60 ${srun_container[@]+"${srun_container[@]}"})
    command=(${in_container[@]+"${in_container[@]}"} "$python" -m rlsc_mcore.cli train "${trainer[@]}")
}

# ------------------------------------------------------------------------------------------------ before the ranks start

_rlsc_check_nodes() { # NODES GPUS
    local status=0 began=$SECONDS log=$RLSC_LOGS/node_checks.log
    rlsc_say "checking $1 nodes: checkout, run folder, GPUs, imports, disk"
    echo "$job.$attempt" >"$run_dir/.canary"
    timeout --kill-after=30 "$((check_timeout_s + 60))" srun --nodes="$1" --ntasks="$1" --ntasks-per-node=1 --mpi=none ${srun_gpus:+"$srun_gpus"} ${srun_container[@]+"${srun_container[@]}"} \
        bash -c 'if [[ ! -r $1 ]]; then echo "rlsc: error: $(hostname): no $1 here; the checkout must be on a shared file system" >&2; exit 2; fi
            source "$1" && shift && rlsc_check_node "$@"' _ "$RLSC_ROOT/launch/node.sh" \
        "$run_dir" "$job.$attempt" "$2" "$min_free_gb" "${RLSC_CHECK_IMPORTS:-1}" "$check_timeout_s" ${in_container[@]+"${in_container[@]}"} "$python" \
        >"$log" 2>&1 || status=$?
    grep -v '^checked ' "$log" >&2 || true
    if ((status == 2)); then exit 2; fi
    # srun also exits with 0 if its step was cancelled before it began, so each node must have printed
    # "checked".
    if ((status == 0 && $(grep -c '^checked ' "$log") == $1)); then return; fi
    if ((SECONDS - began >= check_timeout_s + 60)); then
        rlsc_say "a node did not answer within $((check_timeout_s + 60)) s; srun -w NODE hostname finds it"
    else
        rlsc_say "the node checks were cut off (srun exit $status)"
    fi
    if [[ -n $stop ]]; then return; fi
    if _rlsc_was_refused "$log"; then rlsc_die "srun cannot start a step in this job; its line is above"; fi
    _rlsc_requeue_after_crash "nothing was started"
    exit 75
}

# ------------------------------------------------------------------------------------------------ the ranks

_rlsc_run() { # NODES RANKS_PER_NODE
    local code=0 srun_lines tee_pid
    rlsc_say "starting $(($1 * $2)) ranks; logs: $RLSC_LOGS/rank_*.log"
    # Keep srun's own lines: they distinguish a refused step from a failed one.
    exec {srun_lines}> >(trap '' USR1 USR2 TERM && exec tee -a "$RLSC_LOGS/srun.log" >&2)
    tee_pid=$!
    "${step[@]}" bash -c 'source "$1" && shift && rlsc_rank "$@"' _ "$RLSC_ROOT/launch/node.sh" "${command[@]}" 2>&"$srun_lines" {srun_lines}>&- &
    step_pid=$!
    exec {srun_lines}>&-
    while :; do # a trapped signal ends `wait` early: the step goes on
        code=0
        wait "$step_pid" || code=$?
        kill -0 "$step_pid" 2>/dev/null || break
    done
    srun_code=$code
    wait "$tee_pid" 2>/dev/null || true
    if [[ -n ${relay_pid:-} ]]; then kill "$relay_pid" 2>/dev/null || true; fi
}

# Send USR1 to the ranks every few seconds until they have ended. A rank that is starting may not handle the
# signal yet.
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
