# shellcheck shell=bash
# Environment of a run on a cluster, sourced by launch/lib.sh on the first node and inherited by every rank.
# Each variable has a comment with the reason. A variable that the user has set is not changed.

_default() { if [[ -z ${!1+set} ]]; then export "$1=$2"; fi; }

# --- SLURM
# `sbatch --export=NONE` is inherited by srun, which would then start ranks without PATH.
export SLURM_EXPORT_ENV=ALL

# --- output
_default PYTHONUNBUFFERED 1      # lines reach the logs when they are printed, not when a buffer fills
_default PYTHONFAULTHANDLER 1    # a native crash prints the Python stack
_default NCCL_DEBUG WARN         # one line when NCCL fails; INFO for the network's choice of interfaces
_default TORCH_NCCL_DUMP_ON_TIMEOUT 1 # a hang leaves the flight recorder's file of the last collectives

# --- CUDA and NCCL
# One hardware queue starts Megatron's communication before the computation that overlaps it; needed for
# tp > 1 before Blackwell.
_default CUDA_DEVICE_MAX_CONNECTIONS 1
# Timeout for a hung rank in seconds: waiting ranks stop and the job ends. It must be longer than the longest
# rollout, because data-parallel ranks wait for the rank whose rollout takes longest.
_default RLSC_COLLECTIVE_TIMEOUT_S 1800

# --- vLLM in the trainer's process
_default VLLM_ENABLE_V1_MULTIPROCESSING 0 # the engine lives in the rank's own process, on the trainer's weights
_default VLLM_LOGGING_LEVEL ERROR
_default VLLM_NO_USAGE_STATS 1
_default VLLM_DO_NOT_TRACK 1

# --- compiler caches: on the node, because all ranks of all nodes would lock a shared home directory at the same time
# (launch/node.sh makes the folder, private to the user)
_local=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/rlsc_$(id -un)
export RLSC_NODE_CACHE=$_local
_default TRITON_CACHE_DIR "$_local/triton"
_default TORCHINDUCTOR_CACHE_DIR "$_local/inductor"
_default VLLM_CACHE_ROOT "$_local/vllm"

# --- other libraries
_default TOKENIZERS_PARALLELISM false # forks after threads
_default HF_HUB_DISABLE_PROGRESS_BARS 1

# Not set, for these reasons:
#   PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True  vLLM's sleep mode frees its own pool; expandable segments would allocate the pool's
#                                                     memory elsewhere. vLLM 0.26 disables them around the pool, but only with exactly
#                                                     this spelling in this variable. lib.sh warns about all spellings.
#   NCCL_IB_HCA, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME, NCCL_IB_SL, NCCL_IB_TIMEOUT  depend on the site; see docs/cluster.md.
#   NCCL_NVLS_ENABLE  NCCL detects the support of the switch.
#   OMP_NUM_THREADS   threads of each rank on a CPU; default: by the size of the model and the cores of the rank.
#   TORCH_NCCL_ASYNC_ERROR_HANDLING  on by default in every supported torch.
unset -f _default
unset _local
