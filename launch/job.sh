# shellcheck shell=bash
# Functions for the SLURM job: its id and attempt, the owner of the run folder, the records, the end of the
# job and the requeue. Sourced by launch/lib.sh.

# ------------------------------------------------------------------------------------------------ identity of the job

# Query SLURM about this job. The environment is not reliable: it may hold variables of an outer job (an
# array's ids, a restart count). Sets job (JOB, or ARRAY_TASK in an array, because the plain id may mean all
# tasks), attempt, task and record.
_rlsc_identify_job() {
    job=${SLURM_JOB_ID:-} attempt=0 task="" record=""
    if [[ -z $job ]]; then return; fi
    local end=$((SECONDS + check_timeout_s))
    # The id of an array has several records.
    until record=$(scontrol show job -d -o "$job" 2>/dev/null | grep "^JobId=$job ") && [[ -n $record ]]; do
        if ((SECONDS >= end)); then
            printf 'rlsc: error: SLURM does not answer: scontrol show job %s\n' "$job" >&2
            exit 75
        fi
        sleep 5
    done
    local head=${record%% Command=*}
    if [[ $head =~ \ Restarts=([0-9]+) ]]; then attempt=${BASH_REMATCH[1]}; fi
    if [[ $head =~ \ ArrayJobId=([0-9]+)\ ArrayTaskId=([0-9]+)\  ]]; then
        job=${BASH_REMATCH[1]}_${BASH_REMATCH[2]} task=${BASH_REMATCH[2]}
    fi
    export SLURM_RESTART_COUNT=$attempt # what runs in this job looks at these
    if [[ -z $task ]]; then unset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID; fi
    if [[ -n ${SLURM_HET_SIZE:-} && $head == *" HetJobId="* ]]; then
        rlsc_die "heterogeneous jobs (sbatch ... : ...) cannot be used; ask for one set of nodes"
    fi
}

# Unset the variables that srun reads as options, so that the step gets all resources of the job, independent
# of the submitting job or shell. srun also fails if two of them exclude each other (SLURM_MEM_PER_CPU of an
# interactive job and SLURM_MEM_PER_NODE of this job).
_rlsc_forget_inherited_options() {
    local name
    for name in $(compgen -e | grep -E '^(SLURM|SRUN)_(MEM_PER_|CPU_BIND|MEM_BIND|GPU_BIND|ACCEL_BIND|TRES_|GPUS$|GPUS_PER_|GPU_FREQ|GRES|STEP_GRES|CPUS_PER_|NTASKS|NPROCS|DIST|EXACT|EXCLUSIVE|WHOLE|OVERCOMMIT|OVERLAP|OVERSUBSCRIBE|HINT|THREADS|CORE_SPEC|CONSTRAINT|CLUSTER_CONSTRAINT|HOSTFILE|MULTI|IMMEDIATE|SPREAD_JOB|USE_MIN_NODES|REMOTE_CWD|WORKING_DIR|STDINMODE|STDOUTMODE|STDERRMODE|LABELIO|TIMELIMIT|CONTAINER|HET_|PACK_|RESV_PORTS|OPEN_MODE)'); do
        unset "$name"
    done
}

# Print the number of GPUs of all types in a GRES text: gpu:8, gres:gpu:a100:2,gres:gpu:v100:1,
# gpu:8(IDX:0-3,5).
_rlsc_count_gpus() {
    tr ',' '\n' <<<"$1" | awk -F'[:/=]' '{ sub(/\(.*/, "") } /(^|[:\/])gpu([:=]|$)/ { n += ($NF ~ /^[0-9]+$/) ? $NF : 1 } END { print n + 0 }'
}

# Print the GPUs per node that this job requested, in the format of srun's --gpus-per-node (8, a100:8); print
# nothing without a request.
_rlsc_asked_gpus() {
    if [[ $record =~ \ TresPerNode=([^ ]+) ]]; then
        tr ',' '\n' <<<"${BASH_REMATCH[1]}" | sed -nE 's/^(gres[:\/])?gpu$/1/p; s/^(gres[:\/])?gpu[:=]//p' | paste -sd , -
    fi
}

# Print the number of GPUs on each node: the requested number per node, else the smallest number of all nodes,
# else the recipe's.
_rlsc_gpus_per_node() { # RECIPE'S
    local counts="" entry
    if [[ $record =~ \ TresPerNode=([^ ]+) ]]; then
        entry=$(_rlsc_count_gpus "${BASH_REMATCH[1]}")
        if ((entry)); then
            echo "$entry"
            return
        fi
    fi
    for entry in $(grep -oE ' GRES=[^ ]*' <<<"${record%% Command=*}"); do counts+="$(_rlsc_count_gpus "${entry#GRES=}") "; done
    counts=$(tr ' ' '\n' <<<"$counts" | grep . | sort -n | uniq) || true
    if [[ $(head -n 1 <<<"$counts") == [1-9]* ]]; then
        if [[ $counts == *$'\n'* ]]; then
            rlsc_say "warning: the nodes have ${counts//$'\n'/ and } GPUs; $(head -n 1 <<<"$counts") of each are used (sbatch --gpus-per-node gives all the same)" >&2
        fi
        head -n 1 <<<"$counts"
        return
    fi
    entry=${SLURM_GPUS_PER_NODE:-$1}
    echo "${entry##*:}"
}

# Print the smallest number of CPUs that a node has for this job. srun refuses a step that requests more than
# the smallest node has.
_rlsc_least_cpus() {
    sed 's/([^)]*)//g' <<<"${SLURM_JOB_CPUS_PER_NODE:-${SLURM_CPUS_ON_NODE:-}}" | tr ',' '\n' | sort -n | head -n 1
}

# ------------------------------------------------------------------------------------------------ the run folder

# Return 0 if a job is running or will continue by itself, 1 if not, 2 if SLURM does not answer. With USER
# NAME, another job with the same id does not count (ids start again when a cluster is reinstalled).
_rlsc_lives() { # ID [USER NAME]
    local answer end=$((SECONDS + check_timeout_s))
    until answer=$(squeue --noheader --jobs "$1" --states PENDING,CONFIGURING,RUNNING,COMPLETING,SUSPENDED --format '%u %j' 2>&1); do
        if [[ $answer == *"Invalid job id"* ]]; then return 1; fi
        if ((SECONDS >= end)); then
            rlsc_say "squeue: $answer"
            return 2
        fi
        sleep 5
    done
    if [[ -z $answer ]]; then return 1; fi
    [[ -z ${2:-} || $answer == "$2" ]]
}

_rlsc_claim_run_dir() {
    local owner="" identity="" old
    mkdir -p "$run_dir/logs" || rlsc_die "run_dir: $run_dir cannot be made"
    if [[ -f $run_dir/.owner ]]; then { read -r owner && read -r identity; } <"$run_dir/.owner" || true; fi
    if [[ -n $owner && $owner != "$job" ]]; then
        local alive=0
        _rlsc_lives "$owner" "$identity" || alive=$?
        case $alive in
            0) rlsc_die "run_dir: job $owner is running in $run_dir, or waits in the queue to go on there; wait for it (squeue -j $owner), scancel it or choose another RUN_DIR" ;;
            2)
                printf 'rlsc: error: SLURM does not say whether job %s still runs in %s; nothing was started\n' "$owner" "$run_dir" >&2
                if ((attempt < max_restarts)); then _rlsc_back_into_the_queue "the owner of the run folder is not known" || true; fi
                exit 75
                ;;
        esac
    fi
    printf '%s\n%s %s\n' "$job" "$(id -un)" "${SLURM_JOB_NAME:-}" >"$run_dir/.owner"
    export RLSC_ATTEMPT=$attempt RLSC_LOGS=$run_dir/logs/$job.$attempt
    # Log folders of this attempt or a later one belong to an earlier job that had the same id.
    for old in "$run_dir/logs/$job".*; do
        if [[ -d $old && ${old##*.} =~ ^[0-9]+$ ]] && ((${old##*.} >= attempt)); then
            mv "$old" "$run_dir/logs/before_$(date -r "$old" +%Y%m%dT%H%M%S)_${old##*/}"
        fi
    done
    mkdir -p "$RLSC_LOGS"
    checkpoint_before=$(_rlsc_checkpoint)
    echo "$checkpoint_before" >"$RLSC_LOGS/checkpoint"
    rm -f "$run_dir/ending.json" # an earlier attempt's
    ln -sfn "$job.$attempt" "$run_dir/logs/latest"
    printf '{\n "state": "launching",\n "phase": "node checks",\n "job": "%s",\n "attempt": %d,\n "host": "%s",\n "updated": %s\n}\n' \
        "$job" "$attempt" "$(hostname)" "$(date +%s)" >"$run_dir/status.json.launching"
    mv "$run_dir/status.json.launching" "$run_dir/status.json"
    if (($(_rlsc_fruitless "$attempt") >= max_fruitless)); then
        rlsc_say "not started again: $max_fruitless attempts in a row wrote no checkpoint (RLSC_MAX_FRUITLESS); the last logs: $run_dir/logs"
        _rlsc_settle_status crash "$max_fruitless attempts in a row wrote no checkpoint"
        exit 75
    fi
}

# Print the number of consecutive attempts, up to number LAST - 1, that began with the current checkpoint.
_rlsc_fruitless() { # LAST
    local count=0 number current
    current=$(_rlsc_checkpoint)
    for ((number = $1 - 1; number >= 0; number--)); do
        [[ $(cat "$run_dir/logs/$job.$number/checkpoint" 2>/dev/null) == "$current" ]] || break
        count=$((count + 1))
    done
    echo "$count"
}

# ------------------------------------------------------------------------------------------------ records

# Copy stdin to stdout and replace secrets: the user part of an address, and a key or token in its query.
_rlsc_without_secrets() { sed -E 's#(://)[^/@[:space:]]+@#\1***@#g; s#([?&][^=&[:space:]]*(key|token|secret|pass|sig)[^=&[:space:]]*=)[^&[:space:]]+#\1***#Ig'; }

_rlsc_variables() { # PATTERN FORMAT: the exported variables whose names match, without secrets
    local name value
    for name in $(compgen -e | grep -E "$1"); do
        value=${!name}
        if [[ ${name^^} =~ JWT|KEY|TOKEN|SECRET|PASS|CREDENTIAL ]]; then value='***'; fi
        # shellcheck disable=SC2059  # a format of this file's
        printf "%s=$2\n" "$name" "$value"
    done | _rlsc_without_secrets
}

_rlsc_record() ( # what is needed to run it again; in a subshell: only its files are private
    umask 077
    {
        printf '# submitted from %s\n' "${SLURM_SUBMIT_DIR:-$PWD}"
        printf '# script: %s\n' "$(sed -n 's/.* Command=\(.*\) WorkDir=.*/\1/p' <<<"$record")"
        printf '%q ' "${command[@]}"
        printf '\n'
    } | _rlsc_without_secrets >"$RLSC_LOGS/command.txt"
    _rlsc_variables '^(CUDA|NCCL|TORCH|VLLM|RLSC|GLOO|OMP|SLURM|SBATCH|MASTER|PYTORCH|HF_HUB_OFFLINE)' %q >"$RLSC_LOGS/environment.txt"
    scontrol show hostnames "$SLURM_JOB_NODELIST" >"$RLSC_LOGS/hosts.txt"
    {
        git -C "$RLSC_ROOT" rev-parse HEAD && git -C "$RLSC_ROOT" status --short
    } >"$RLSC_LOGS/git.txt" 2>&1 || true
    git -C "$RLSC_ROOT" diff HEAD >"$RLSC_LOGS/git.diff" 2>/dev/null || true
    "$host_python" -c 'import importlib.metadata as m, sys
print("python", sys.version.split()[0])
for name in sorted({f"{d.name}=={d.version}" for d in m.distributions()}, key=str.lower): print(name)' >"$RLSC_LOGS/packages.txt" 2>&1 || true
)

# ------------------------------------------------------------------------------------------------ end of the job

_rlsc_status() { sed -n "s/^ \"$1\": \"\{0,1\}\([^\",]*\).*/\1/p" "$run_dir/status.json" 2>/dev/null | head -n 1; }
_rlsc_checkpoint() { cat "$run_dir/checkpoints/latest" 2>/dev/null || echo none; }

# Write the final state to status.json if no rank has written one; a rank's own state is kept. Call it only
# when no rank writes.
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

# Return 0 if srun refused the request, by its output in FILE. It would refuse the same request every time.
_rlsc_was_refused() { # FILE
    grep -qE 'srun: fatal:|srun: error: ([Ii]nvalid|[Uu]nrecognized|.* is not a valid)|Unable to create step.*(More processors requested|node configuration|Invalid|Memory required|not permitted)' "$1" 2>/dev/null
}

_rlsc_end() {
    local state code="" rank="" host="" after
    if [[ -f $RLSC_LOGS/first_failure ]]; then read -r code rank host <"$RLSC_LOGS/first_failure"; fi
    if [[ $stop == dying ]]; then
        _rlsc_settle_status crash "ended by SLURM before it could save"
    elif [[ -n $rank ]]; then
        _rlsc_settle_status crash "rank $rank on $host exited with code $code and could not say why; the end of its log is in the job's output"
    elif [[ ! -f $RLSC_LOGS/step ]] && _rlsc_was_refused "$RLSC_LOGS/srun.log"; then
        _rlsc_settle_status config "srun refused the step; its line is in the job's output"
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
    if [[ $after != "$checkpoint_before" ]]; then
        _rlsc_requeue_after_crash "crashed, but the run had moved on"
    elif ! _rlsc_nodes_answer; then
        _rlsc_requeue_after_crash "a node of this job does not answer"
    else
        rlsc_say "not requeued: no checkpoint since this attempt began, so it would fail again"
    fi
    if [[ -z $code || $code == 0 ]]; then code=$srun_code; fi
    exit "$((code ? code : 1))"
}

# Return 0 if all nodes still run a task. A dead node is not a fault of the run, and the ranks detect it
# before SLURM does.
_rlsc_nodes_answer() {
    local nodes=${SLURM_JOB_NUM_NODES:-1}
    if ((nodes == 1)); then return 0; fi
    (($(timeout --kill-after=5 60 srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --mpi=none echo alive 2>/dev/null | grep -c alive) == nodes))
}

_rlsc_end_stopped() { # WHAT
    case $stop in
        quit) exit 0 ;;
        dying) exit 143 ;; # scancel, or SLURM's own requeue: never second-guess it
    esac
    if (($(_rlsc_fruitless "$((attempt + 1))") >= max_fruitless)); then
        rlsc_say "not requeued: $max_fruitless attempts in a row wrote no checkpoint (RLSC_MAX_FRUITLESS); the time limit, or the warning before it, is too short"
        exit 75
    fi
    _rlsc_back_into_the_queue "$1" || exit 75
}

_rlsc_requeue_after_crash() { # WHY: returns if there were too many, or SLURM refuses
    local crashes
    crashes=$(find "$run_dir/logs" -path "*/logs/$job.*/requeued_after_crash" | wc -l)
    if ((crashes >= max_restarts)); then
        rlsc_say "not requeued: crashed $((crashes + 1)) times (RLSC_MAX_RESTARTS=$max_restarts)"
        return 0
    fi
    : >"$RLSC_LOGS/requeued_after_crash"
    _rlsc_back_into_the_queue "$1" || true
}

_rlsc_back_into_the_queue() { # WHY: does not return, unless SLURM refuses
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
