# shellcheck shell=bash
# Sourced by demo.sh and test.sh in the repository root: `set_up` makes .venv once.
#
#   SLIMSTATE_PYTHON   the Python to use (default: the first of python3, python3.13 … that will do)
#
# pip's own settings hold. The default torch brings CUDA along; on a machine without an NVIDIA GPU
# a CPU build is smaller: name where to find one in PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS.

VENV=.venv
STAMP=$VENV/slimstate-stamp

fail() {
    echo "slimstate: $1" >&2
    exit 1
}

set_up() {
    is_current && return
    local python
    python=$(choose_python) || exit 1
    check_compiler "$python"
    mkdir -p "$VENV"
    # The kernel drops the lock with the process that holds it, so a killed set-up blocks nobody.
    exec 9>"$VENV/slimstate-lock"
    lock
    is_current || install_all "$python"
    exec 9>&-
}

has_gpu() {
    [[ -e /dev/nvidia0 ]]
}

is_current() {
    [[ -f $STAMP && -x $VENV/bin/python && -x $VENV/bin/slimstate && $(cat "$STAMP") == "$(wanted)" ]]
}

# What .venv was made from: the requirements, and where the checkout lies (scripts name it).
wanted() {
    { cat pyproject.toml constraints.txt && pwd -P; } | cksum
}

lock() {
    command -v flock >/dev/null || return 0
    flock -n 9 && return
    echo "slimstate: another set-up is running here: waiting for it" >&2
    flock 9
}

choose_python() {
    local candidate found="" candidates=(python3 python3.13 python3.12 python3.11)
    [[ -n ${SLIMSTATE_PYTHON:-} ]] && candidates=("$SLIMSTATE_PYTHON")
    for candidate in "${candidates[@]}"; do
        command -v "$candidate" >/dev/null || continue
        found=$candidate
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || continue
        check_venv "$candidate" || return 1
        command -v "$candidate"
        return
    done
    [[ -n ${SLIMSTATE_PYTHON:-} && -z $found ]] && fail "SLIMSTATE_PYTHON is $SLIMSTATE_PYTHON, which is no program"
    [[ -z $found ]] && fail "no python3 found: apt-get install python3 python3-venv"
    fail "$found is $("$found" -V 2>&1), but 3.11 or newer is needed: set SLIMSTATE_PYTHON to one"
}

check_venv() {
    "$1" -c 'import venv, ensurepip' 2>/dev/null && return
    fail "$1 lacks the venv module: apt-get install $(debian_name "$1")-venv"
}

# Triton compiles its kernels' launchers at run time; nothing is compiled on a machine without a GPU.
check_compiler() {
    has_gpu || return 0
    command -v "${CC:-cc}" >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
        fail "no C compiler found, which Triton needs on a GPU: apt-get install build-essential"
    "$1" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        fail "$1 lacks its headers, which Triton needs on a GPU: apt-get install $(debian_name "$1")-dev"
}

debian_name() {
    local base
    base=$(basename "$1")
    [[ $base == python3* ]] && echo "$base" || echo python3
}

# The stamp goes first and comes back last, so that an interrupted set-up is done again.
install_all() {
    echo "slimstate: setting up $VENV with $("$1" -V) (once; some minutes)" >&2
    rm -f "$STAMP"
    "$1" -m venv "$VENV" || fail "$1 -m venv $VENV failed: see above"
    pip_install -c constraints.txt torch
    pip_install -c constraints.txt -e ".[dev]"
    wanted >"$STAMP"
}

pip_install() {
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@" ||
        fail "pip could not install ${*: -1}: see above (network? disk? PIP_INDEX_URL?)"
}
