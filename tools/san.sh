#!/usr/bin/env bash
# Runs tests with the extension built under AddressSanitizer and UndefinedBehaviorSanitizer, in a
# folder of its own. The C programs of tests/c run under both, and under ThreadSanitizer, with
# `make test`.
#
#   tools/san.sh [pytest arguments]     all tests that load in this process, where none are given
#
# The interpreter is not instrumented, so the sanitizers' libraries are loaded before it and leaks
# are not looked for (tests/test_leaks.py does that); its own allocator gives way to malloc, which
# is watched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build=.san/lib
STX_SANITIZE=address,undefined .venv/bin/python setup.py -q \
    build --build-base .san --build-lib "$build" >.san.log 2>&1 || { cat .san.log; exit 1; }
rm -f .san.log

if [ $# = 0 ]; then
    set -- tests/test_{parity,slices,storage,threads,header_errors,bad_input,filter,glob_twin}.py \
        tests/test_{stats,explain,core_cases,odd_cases,differential,contract}.py
fi

library() { "${CC:-gcc}" -print-file-name="$1"; }

# The current folder would come before PYTHONPATH, in processes that tests start as well.
export PYTHONPATH="$PWD/$build" PYTHONSAFEPATH=1 PYTHONMALLOC=malloc
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:handle_segv=0
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export LD_PRELOAD
LD_PRELOAD="$(library libasan.so):$(library libubsan.so):$(library libstdc++.so.6)"

.venv/bin/python - "$PWD/$build" <<'PYTHON'
import sys

from stx_patch import _C

assert _C.__file__.startswith(sys.argv[1]), _C.__file__
assert b"__asan_init" in open(_C.__file__, "rb").read()
PYTHON
.venv/bin/pytest -q -p no:cacheprovider --timeout 300 "$@"
