#!/usr/bin/env bash
# Makes a fresh machine ready: system packages, .venv, the built extension. Called by the Makefile.
#
#   tools/setup.sh                 all of it
#   tools/setup.sh no-build        without the extension
#   tools/setup.sh with-upstream   and safetensors' and transformers' own tests
#   tools/setup.sh with-clang      and clang with libFuzzer, and clang-tidy
#   tools/setup.sh with-peers      and other loaders, in .peers, for the benchmarks
#
# Each step says what it does and is skipped when it was done before with the same inputs: their
# hashes are kept in .stamps/. System packages are installed by apt-get, as root or through sudo;
# elsewhere a line says what is missing. PYTHON names the interpreter for a new .venv, python3 where
# it is empty; the STX_* switches are those of setup.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
venv_python=.venv/bin/python
first_second=$SECONDS

say() { printf 'set-up: %s\n' "$*"; }
stop() {
    printf 'set-up: %s\n' "$*" >&2
    exit 1
}
hash_of_input() { sha256sum | cut -d ' ' -f 1; }
stamp() { cat ".stamps/$1" 2>/dev/null || true; }

# --- system packages ---------------------------------------------------------------------------

# Prints the Debian packages of what is not there, found by looking for the thing itself, so that
# what came another way (conda, pyenv, a container image) counts.
missing_packages() {
    local has
    for has in gcc g++ pkg-config; do
        command -v "$has" >/dev/null || echo "$has"
    done
    pkg-config --exists simdjson 2>/dev/null || echo libsimdjson-dev
    pkg-config --exists liburing 2>/dev/null || echo liburing-dev

    if ! command -v "$python" >/dev/null; then
        [ "$python" = python3 ] || stop "$python not found: install it or set PYTHON"
        echo python3 python3-venv python3-dev
        return
    fi
    local name # python3, or python3.12 where that is not the system's own python3
    name=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    [ "$(readlink -f /usr/bin/python3)" != "/usr/bin/$name" ] || name=python3
    "$python" -c 'import ensurepip' 2>/dev/null || echo "$name-venv"
    "$python" -c 'import os, sysconfig
os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null || echo "$name-dev"
}

# The same for what fuzzing and analysis need.
missing_clang() {
    command -v clang++ >/dev/null || echo clang
    echo 'int LLVMFuzzerTestOneInput(void) { return 0; }' |
        clang -fsanitize=fuzzer -x c - -o /dev/null 2>/dev/null || echo libclang-rt-dev
    command -v clang-tidy >/dev/null || echo clang-tidy
}

system_step() { # $1: what prints the packages that are missing
    [ "$(uname -s)" = Linux ] || return 0 # no extension is built there
    local missing
    missing=$("$1" | xargs)
    if [ -z "$missing" ]; then return; fi
    if ! command -v apt-get >/dev/null; then
        stop "install what Debian calls $missing with this system's package manager, then try again"
    fi
    local as_root=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || stop "as root, run: apt-get install $missing"
        as_root=(sudo)
    fi
    say "installing system packages: $missing"
    "${as_root[@]}" apt-get update -qq ||
        say "apt-get update failed; going on with the package lists that are there"
    # shellcheck disable=SC2086  # a list of words
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends $missing >/dev/null ||
        stop "apt-get could not install: $missing"
    missing=$("$1" | xargs)
    if [ -n "$missing" ]; then
        stop "installed, but still not found: $missing (is $python the system's Python?)"
    fi
}

# --- .venv -------------------------------------------------------------------------------------

venv_hash() { cat tools/setup.sh requirements-dev.txt | hash_of_input; }

install() { "$venv_python" -m pip install -q --disable-pip-version-check --no-input "$@"; }

venv_step() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        stop "Python 3.10 or newer is needed, $python is older: set PYTHON"
    if ! "$venv_python" -m pip --version >/dev/null 2>&1; then
        say "making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv
    fi
    local torch
    torch=$(grep '^torch==' requirements-dev.txt)
    say "installing $torch into .venv (large where it is not there yet)"
    install "$torch"
    say "installing the rest of requirements-dev.txt into .venv"
    install -r requirements-dev.txt
    local alone
    alone=$(sed -n 's/^# alone: \([^ ]*\).*/\1/p' requirements-dev.txt)
    # shellcheck disable=SC2086  # a list of words
    install --no-deps $alone
    printf '%s\n' "$1" >.stamps/venv
}

# --- upstream's tests --------------------------------------------------------------------------

upstream_step() {
    "$venv_python" tools/upstream.py fetch
    printf '%s\n' "$1" >.stamps/upstream
}

# --- peers -------------------------------------------------------------------------------------

# Other loaders, in a folder of their own, so that they replace nothing. What cannot be installed
# leaves its error in .peers/failed, for its row in the tables.
peers_step() {
    rm -rf .peers
    mkdir -p .peers/site .peers/failed
    local package
    for package in $(grep -v '^#' benchmarks/peers.txt); do
        say "installing $package into .peers"
        if ! install --no-deps --target .peers/site "$package" 2>.peers/error; then
            grep ERROR .peers/error | tail -n 1 >".peers/failed/$package" || true
            say "could not install $package: $(cat ".peers/failed/$package")"
        fi
    done
    rm -f .peers/error
    printf '%s\n' "$1" >.stamps/peers
}

# --- extension ---------------------------------------------------------------------------------

# STX_WERROR is left out: it changes whether the build succeeds, not what is built.
build_hash() {
    {
        echo "$1 ${STX_DEBUG:-} ${STX_SANITIZE:-} ${STX_COVERAGE:-} ${CFLAGS:-} ${CXXFLAGS:-}"
        cat setup.py pyproject.toml
        find csrc -name '*.[ch]' -print0 -o -name '*.cpp' -print0 | sort -z | xargs -0 sha256sum
    } | hash_of_input
}

build_is_current() { # a build without warnings also serves who did not ask for that
    compgen -G 'stx_patch/_C*.so' >/dev/null || [ "$(uname -s)" != Linux ] || return 1
    [ "$(stamp build)" = "$1 strict" ] || [ "$(stamp build)" = "$1${STX_WERROR:+ strict}" ]
}

build_step() {
    say "building stx_patch into this folder (pip install -e .)"
    install --no-build-isolation --no-deps -e .
    printf '%s\n' "$1${STX_WERROR:+ strict}" >.stamps/build
}

# -----------------------------------------------------------------------------------------------

mkdir -p .stamps
if command -v flock >/dev/null; then # two set-ups in one folder take turns
    exec 9>.stamps/lock
    flock 9
fi

version='import sys; print("%d.%d" % sys.version_info[:2])'
if [ -n "${PYTHON:-}" ] && [ -x "$venv_python" ]; then
    [ "$("$python" -c "$version")" = "$("$venv_python" -c "$version")" ] ||
        stop ".venv was not made with $python: make distclean first"
fi

venv=$(venv_hash)
if [ "${1:-}" = with-clang ] && [ "$(stamp clang)" != "$venv" ]; then
    did_nothing=
    system_step missing_clang
    printf '%s\n' "$venv" >.stamps/clang
fi
upstream=$(cat tools/upstream.py requirements-dev.txt | hash_of_input)
build=$(build_hash "$venv")
did_nothing=yes
if [ "$(stamp venv)" != "$venv" ] || [ ! -x "$venv_python" ]; then
    did_nothing=
    system_step missing_packages
    venv_step "$venv"
fi
if [ "${1:-}" = with-upstream ] &&
    { [ "$(stamp upstream)" != "$upstream" ] || [ ! -d .upstream ]; }; then
    did_nothing=
    upstream_step "$upstream"
fi
peers=$(cat benchmarks/peers.txt requirements-dev.txt | hash_of_input)
if [ "${1:-}" = with-peers ] && { [ "$(stamp peers)" != "$peers" ] || [ ! -d .peers ]; }; then
    did_nothing=
    peers_step "$peers"
fi
if [ "${1:-}" != no-build ] && ! build_is_current "$build"; then
    did_nothing=
    system_step missing_packages
    build_step "$build"
fi
[ -n "$did_nothing" ] || say "done in $((SECONDS - first_second)) s"
