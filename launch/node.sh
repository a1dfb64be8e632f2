# shellcheck shell=bash
# Functions that run in the tasks of a job: the checks of a node, and the start of a rank. Sourced in the
# tasks by launch/lib.sh.

# Print the packages that are not installed, or the first one that a Python cannot import, with the reason;
# print nothing if there is none. One process imports all packages, as a rank does, because libraries can
# break each other.
rlsc_broken_import() { # IMPORTS SECONDS PYTHON...
    local imports=$1 seconds=$2 code=0 output
    shift 2
    output=$(timeout --kill-after=5 "$seconds" "$@" -c 'import importlib, importlib.util, os, sys
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
        124 | 137) echo "torch, megatron.core and vllm within $seconds s (RLSC_CHECK_TIMEOUT_S)" ;;
        *) echo "any package: exit code $code, $(tail -n 1 <<<"$output")" ;;
    esac
}

# Print the devices that are visible to this task, one per line: a whole GPU by its index or id, a slice of a
# GPU (MIG) as "MIG ...".
rlsc_visible_devices() {
    local gpus device
    # "INDEX UUID SLICES" for each GPU that the driver lists
    gpus=$(nvidia-smi -L 2>/dev/null | awk '
        /^GPU / { if (gpu != "") print gpu, slices + 0; slices = 0; gpu = $2; sub(/:$/, "", gpu); uuid = $NF; sub(/\)$/, "", uuid); gpu = gpu " " uuid }
        /^ +MIG / { slices++ }
        END { if (gpu != "") print gpu, slices + 0 }')
    if [[ -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
        awk 'NF { if ($3) for (i = 0; i < $3; i++) print "MIG slice of GPU", $1; else print $1 }' <<<"$gpus"
        return
    fi
    for device in ${CUDA_VISIBLE_DEVICES//,/ }; do
        case $device in
            NoDevFiles | void | none | -1) ;; # SLURM and container runtimes say "none" so
            MIG*) echo "MIG $device" ;;
            *) awk -v device="$device" '(device == $1 || device == $2) && $3 { sliced = 1 } END { print (sliced ? "MIG slice of GPU " : "") device }' <<<"$gpus" ;;
        esac
    done
}

# Check this node. RUN_DIR CANARY GPUS FREE_GB IMPORTS SECONDS PYTHON...; prints one line per fault, with the
# node's name, or "checked NODE".
rlsc_check_node() {
    local run_dir=$1 canary=$2 gpus=$3 free_gb=$4 imports=$5 seconds=$6 bad=0 devices visible slices free broken host
    host=$(hostname)
    shift 6
    fault() {
        printf 'rlsc: error: %s: %s\n' "$host" "$*" >&2
        bad=2
    }
    if [[ $(cat "$run_dir/.canary" 2>/dev/null) != "$canary" ]]; then
        fault "run_dir $run_dir is not the folder that the first node sees; choose one on a shared file system${CONTAINER:+, and name it in MOUNTS}"
    else
        free=$(($(df --output=avail -B 1000000000 "$run_dir" | tail -n 1)))
        if ((free < free_gb)); then fault "$free GB free in $run_dir, $free_gb wanted (RLSC_MIN_FREE_GB)"; fi
    fi
    if ((gpus)); then
        devices=$(rlsc_visible_devices)
        visible=$(grep -c . <<<"$devices") || true
        slices=$(grep -c ^MIG <<<"$devices") || true
        if ((visible < gpus)); then
            fault "$visible GPUs visible, $gpus wanted (CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-unset}); see sbatch --gpus-per-node and GPUS_PER_NODE"
        elif ((gpus > 1 && slices)); then
            fault "$slices of the $visible GPUs are slices (MIG), between which NCCL cannot work; ask for whole GPUs, or for one slice and TP=1"
        fi
    fi
    broken=$(rlsc_broken_import "$imports" "$seconds" "$@")
    if [[ -n $broken ]]; then fault "$* cannot import $broken; install on a shared file system (bash launch/install.sh) or set PYTHON"; fi
    if ((bad == 0)); then echo "checked $host"; fi
    return "$bad"
}

# Make the folder of this node's compiler caches. It is private to this user, because compilers load libraries
# from it. If the folder belongs to another user, use a temporary folder of this task and remove it at the
# end.
rlsc_private_caches() {
    local shared=${RLSC_NODE_CACHE:-} name
    if [[ -z $shared ]]; then return 0; fi # all caches are where the user wants them
    if (umask 077 && mkdir -p "$shared") 2>/dev/null && [[ -d $shared && ! -L $shared && -O $shared ]] && chmod 700 "$shared" 2>/dev/null; then return 0; fi
    RLSC_NODE_CACHE=$(mktemp -d "${TMPDIR:-/tmp}/rlsc_cache.XXXXXX") || return 0
    trap 'rm -rf "$RLSC_NODE_CACHE"' EXIT
    echo "rlsc: warning: $(hostname): $shared belongs to somebody else; compiling into $RLSC_NODE_CACHE"
    for name in TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR VLLM_CACHE_ROOT; do
        if [[ ${!name:-} == "$shared"/* ]]; then export "$name=$RLSC_NODE_CACHE/${!name##*/}"; fi
    done
}

# Set the variables of a rank and run COMMAND... in this task. Ignore the signals that request a save, so that
# they end neither this shell nor a trainer that has not installed its handlers yet.
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
    rlsc_private_caches
    "$@" || code=$?
    if ((code)); then
        # Record the first rank that fails. srun returns the exit code of the ranks that it kills afterwards.
        (set -o noclobber && echo "$code $RANK $(hostname)" >"$RLSC_LOGS/first_failure") 2>/dev/null || true
    fi
    exit "$code"
}
