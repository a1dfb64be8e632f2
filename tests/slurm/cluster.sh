#!/usr/bin/env bash
# A real SLURM cluster on one machine, without systemd: slurmctld, munge and one slurmd per virtual node, started by hand from a
# private directory. A node is a set of namespaces (host name, mounts, network) around its slurmd. The nodes of one cluster share a
# /dev/shm of their own: vLLM's collectives on a CPU meet there, also those of ranks on two nodes.
#
#   cluster.sh install        Debian's packages, where they are missing (seconds, 4 MB)
#   cluster.sh start          bring the cluster up (a second); prints `export SLURM_CONF=...`
#   cluster.sh crash I        power node I off: everything on it dies at once, nothing is told
#   cluster.sh revive I       power it on again
#   cluster.sh in I COMMAND   run a command in node I's namespaces
#   cluster.sh processes [I]  ids of everything that lives on the nodes but slurmd itself
#   cluster.sh stop           cancel every job, end what this cluster started and nothing else
#
# Settings, from the environment:
#   CLUSTER_DIR        state, logs, process ids; every parent must be open to all users (required, but by install)
#   CLUSTER_NODES=2    virtual nodes n1, n2, ...
#   CLUSTER_CPUS=16    CPUs that each node claims; 16,8 gives n1 16 and every other node 8
#   CLUSTER_MEM=65536  MiB that each node claims; CPUs and memory may exceed what the machine has
#   CLUSTER_GPUS=8     GPUs that each node claims, /dev/null behind each; 8,4 as with CPUs; 0 for a cluster without GRES
#   CLUSTER_GPU_TYPE   type of the GPUs, for example a100_1g.5gb (default: none)
#   CLUSTER_GRACE=120  GraceTime of preemption in partition main, in seconds; in partition hasty it is 5
#   CLUSTER_USERSIG=0  1: preemption sends the job's --signal instead of SIGTERM
set -u
dir=${CLUSTER_DIR:-/nonexistent}
nodes=${CLUSTER_NODES:-2} mem=${CLUSTER_MEM:-65536} gpu_type=${CLUSTER_GPU_TYPE:+${CLUSTER_GPU_TYPE}:}
IFS=, read -ra cpus <<<"${CLUSTER_CPUS:-16}" # per node; the last one counts for all further nodes
IFS=, read -ra gpus <<<"${CLUSTER_GPUS:-8}"
grace=${CLUSTER_GRACE:-120} usersig=${CLUSTER_USERSIG:-0}
kill_wait=5 # seconds from SIGTERM to SIGKILL (SLURM's default is 30)
conf=$dir/slurm.conf pids=$dir/pids
net=$(cat "$dir/run/net" 2>/dev/null) # number of the bridge and of its subnet
up=""

die() {
    echo "cluster: $*" >&2
    exit 1
}
cannot() { # not on this machine, whatever is done
    echo "cluster: $*" >&2
    up=no
    exit 3
}

# Field 22 of /proc/PID/stat: with the id it names one process for good. Nothing for a zombie.
start_time() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 !~ /[ZX]/ { print $20 }'; }
record() { echo "$1 $(start_time "$1") $2" >>"$pids"; }
is_ours() { [[ -n $2 && $(start_time "$1") == "$2" ]]; }

# Everything alive on the nodes (or on node $1): whatever has the host name's namespace that a slurmd was given, also after setsid.
living() {
    [[ -s $dir/namespaces ]] || return 0
    find /proc/[0-9]*/ns -maxdepth 1 -name uts -printf '%h %l\n' 2>/dev/null |
        awk -v node="${1:+n$1}" 'NR == FNR { if (node == "" || $1 == node) wanted[$2]; next }
            $2 in wanted { split($1, path, "/"); print path[3] }' "$dir/namespaces" -
}

processes() { # [I]
    local id
    for id in $(living "${1:-}"); do
        awk -v id="$id" '$1 == id && $3 == "slurmd" { found = 1 } END { exit !found }' "$pids" || echo "$id"
    done
}

install() {
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null && command -v munged >/dev/null && return
    command -v apt-get >/dev/null || cannot "SLURM is not installed, and there is no apt-get to install it with"
    [[ $(id -u) == 0 ]] || cannot "SLURM is not installed; as root: apt-get install slurmctld slurmd slurm-client munge"
    # RUNLEVEL=1: the packages' own init scripts start nothing
    { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        slurmctld slurmd slurm-client munge; } >/dev/null 2>&1 || cannot "apt-get install slurmctld slurmd slurm-client munge failed"
}

free_ports() { # N ports that are free on every address, below the ephemeral range
    python3 - "$1" <<'PYTHON'
import random, socket, sys

ports = []
while len(ports) < int(sys.argv[1]):
    port = random.randrange(30000, 32000)
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            continue
    ports += [port] if port not in ports else []
print(*ports)
PYTHON
}

of_node() { # I VALUES...: the I-th value, or the last one
    local i=$1
    shift
    echo "${!i:-${!#}}"
}

write_conf() {
    local i subnet=10.209.$net ports
    read -ra ports <<<"$(free_ports $((nodes + 1)))"
    cp /etc/hosts "$dir/hosts"
    echo "$subnet.1 slurmctl" >>"$dir/hosts"
    for ((i = 1; i <= nodes; i++)); do echo "$subnet.$((10 + i)) n$i" >>"$dir/hosts"; done
    {
        cat <<CONF
ClusterName=local
SlurmctldHost=slurmctl($subnet.1)
SlurmctldPort=${ports[0]}
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits: 5 s is the least, 120 s the default
AuthInfo=socket=$dir/run/munge.sock,cred_expire=6
# a busy machine is no broken one
MessageTimeout=60
TCPTimeout=20
BatchStartTimeout=120
UnkillableStepTimeout=300
# nothing listens on every address of the machine
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=$((mem / cpus[0]))
# nodes may claim more than the machine has
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=$kill_wait
MinJobAge=3600
SlurmdTimeout=30
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
EnforcePartLimits=ALL
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONF
        if [[ $usersig == 1 ]]; then echo "SlurmctldParameters=preempt_send_user_signal"; fi
        if ((gpus[0])); then echo "GresTypes=gpu"; fi
        for ((i = 1; i <= nodes; i++)); do
            echo "NodeName=n$i NodeHostName=n$i NodeAddr=$subnet.$((10 + i)) Port=${ports[i]} CPUs=$(of_node "$i" "${cpus[@]}")" \
                "RealMemory=$mem$( ((gpus[0])) && echo " Gres=gpu:$gpu_type$(of_node "$i" "${gpus[@]}")")"
        done
        echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=$grace OverSubscribe=NO"
        echo "PartitionName=hasty Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=5 OverSubscribe=NO"
        echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF"
    } >"$conf"
    if ((gpus[0])); then # a GPU's file must be a character device
        for ((i = 0; i < gpus[0]; i++)); do ln -sfn /dev/null "$dir/dev/nvidia$i"; done
        for ((i = 1; i <= nodes; i++)); do
            echo "NodeName=n$i Name=gpu ${gpu_type:+Type=${gpu_type%:} }Flags=nvidia_gpu_env" \
                "File=$dir/dev/nvidia[0-$(($(of_node "$i" "${gpus[@]}") - 1))]"
        done >"$dir/gres.conf"
    fi
    (umask 077 && head -c 1024 /dev/urandom >"$dir/run/munge.key")
}

start_node() { # I
    local i=$1 pid
    rm -f "$dir/run/id.n$i" "$dir/run/ready.n$i"
    # exec all the way: the id of unshare becomes that of slurmd
    unshare --mount --uts --net bash -c '
        mount --bind "$1/hosts" /etc/hosts && mount --bind "$1/shm" /dev/shm && hostname "n$2" || exit 1
        echo "n$2 $(readlink /proc/self/ns/uts)" >>"$1/namespaces"
        echo $$ >"$1/run/id.n$2.partial" && mv "$1/run/id.n$2.partial" "$1/run/id.n$2"
        for _ in $(seq 200); do [[ -e $1/run/ready.n$2 ]] && break; sleep 0.05; done
        exec slurmd -D -N "n$2" -f "$1/slurm.conf"' _ "$dir" "$i" >"$dir/log/n$i.out" 2>&1 </dev/null &
    pid=$!
    disown
    record "$pid" "slurmd n$i"
    for _ in $(seq 200); do
        [[ -s $dir/run/id.n$i ]] && break
        sleep 0.05
    done
    { ip link add "rlscsl${net}v$i" type veth peer name eth0 netns "$pid" &&
        ip link set "rlscsl${net}v$i" master "rlscsl$net" up &&
        nsenter -t "$pid" -n ip link set lo up &&
        nsenter -t "$pid" -n ip addr add "10.209.$net.$((10 + i))/24" dev eth0 &&
        nsenter -t "$pid" -n ip link set eth0 up; } || die "the network of n$i could not be made"
    : >"$dir/run/ready.n$i"
}

start() {
    local pid begun name i
    [[ $dir != /nonexistent ]] || die "set CLUSTER_DIR to a directory for the cluster"
    if [[ -s $pids ]]; then
        while read -r pid begun name; do is_ours "$pid" "$begun" && die "already started in $dir (stop it first)"; done <"$pids"
        stop # left by a cluster that is dead
    fi
    [[ -e $dir && ! -e $dir/.rlsc_cluster && -n $(ls -A "$dir") ]] && die "$dir is there and is no cluster's: it would be erased"
    [[ $(id -u) == 0 ]] || cannot "needs root, to make namespaces"
    install
    rm -rf "$dir"
    mkdir -p "$dir"/{state,spool,log,run,dev,shm} && : >"$dir/.rlsc_cluster" && chmod 755 "$dir" || die "cannot write $dir"
    trap 'code=$?; if [[ -z $up ]]; then tail -n 5 "$dir"/log/* >&2; stop; fi; exit $code' EXIT
    mount -t tmpfs tmpfs "$dir/shm" || cannot "a tmpfs cannot be mounted here"
    for net in $(seq 77 97) ""; do # the name is the lock: the first bridge that can be made is ours
        [[ -n $net ]] || die "no network bridge could be made"
        ip link add "rlscsl$net" type bridge 2>/dev/null && break
    done
    echo "$net" >"$dir/run/net"
    ip addr add "10.209.$net.1/24" dev "rlscsl$net" && ip link set "rlscsl$net" up || die "the network bridge did not come up"
    write_conf
    munged -F --socket="$dir/run/munge.sock" --key-file="$dir/run/munge.key" --pid-file="$dir/run/munged.pid" \
        --seed-file="$dir/run/munged.seed" --log-file="$dir/log/munged.log" --num-threads=4 >"$dir/log/munged.out" 2>&1 </dev/null &
    pid=$!
    disown
    record "$pid" munged
    for _ in $(seq 200); do
        [[ -S $dir/run/munge.sock ]] && break
        sleep 0.05
    done
    [[ -S $dir/run/munge.sock ]] || die "munged did not start"
    unshare --mount --uts bash -c 'mount --bind "$1/hosts" /etc/hosts && hostname slurmctl && exec slurmctld -D -f "$1/slurm.conf"' \
        _ "$dir" >"$dir/log/slurmctld.out" 2>&1 </dev/null &
    pid=$!
    disown
    record "$pid" slurmctld
    for ((i = 1; i <= nodes; i++)); do start_node "$i"; done
    export SLURM_CONF=$conf
    SECONDS=0
    while ((SECONDS < 40)); do
        if [[ $(timeout 5 sinfo -h -N -p main -o %T 2>/dev/null | grep -c '^idle$') == "$nodes" ]]; then
            up=1
            echo "export SLURM_CONF=$conf"
            return
        fi
        sleep 0.2
    done
    die "the nodes did not come up in 40 s"
}

crash() { # I
    local victims round=0
    while victims=$(living "$1") && [[ -n $victims ]] && ((round++ < 20)); do
        # shellcheck disable=SC2086  # a list of ids
        kill -KILL $victims 2>/dev/null
        sleep 0.1
    done
    sed -i "/^n$1 /d" "$dir/namespaces"
}

stop() {
    local ids pid begun name signal left
    [[ -e $conf || -e $pids || -e $dir/run/net ]] || return 0
    export SLURM_CONF=$conf
    ids=$(timeout 5 squeue -h -o %A 2>/dev/null | sort -u) # nothing where the controller is gone
    if [[ -n $ids ]]; then
        # shellcheck disable=SC2086  # a list of ids
        timeout 5 scancel $ids 2>/dev/null
        for _ in $(seq $(((kill_wait + 3) * 5))); do
            [[ -z $(timeout 5 squeue -h -o %A 2>/dev/null) ]] && break
            sleep 0.2
        done
    fi
    for signal in TERM KILL; do
        [[ -s $pids ]] || break
        while read -r pid begun name; do is_ours "$pid" "$begun" && kill -"$signal" "$pid" 2>/dev/null; done <"$pids"
        for _ in $(seq 25); do
            left=""
            while read -r pid begun name; do is_ours "$pid" "$begun" && left=$name; done <"$pids"
            [[ -z $left ]] && break 2
            sleep 0.2
        done
    done
    for signal in TERM KILL KILL; do
        left=$(living)
        [[ -z $left ]] && break
        # shellcheck disable=SC2086  # a list of ids
        kill -"$signal" $left 2>/dev/null
        sleep 0.5
    done
    net=$(cat "$dir/run/net" 2>/dev/null)
    [[ -n $net ]] && ip link del "rlscsl$net" 2>/dev/null
    umount "$dir/shm" 2>/dev/null
    rm -f "$pids" "$conf" "$dir/run/net"
}

case ${1:-} in
    install | start | stop) "$1" ;;
    processes) processes "${2:-}" ;;
    crash | revive | in)
        [[ -s $pids ]] || die "not running"
        [[ ${2:-} =~ ^[0-9]+$ ]] || die "$1 needs a node's number"
        case $1 in
            crash) crash "$2" ;;
            revive) start_node "$2" ;;
            in) nsenter -t "$(cat "$dir/run/id.n$2")" --mount --uts --net "${@:3}" ;;
        esac
        ;;
    *)
        sed -n '2,/^set -u/p' "$0" | sed '$d; s/^# \{0,1\}//'
        exit 2
        ;;
esac
