#!/usr/bin/env bash
# The tests from a fresh checkout: set up .venv, then pytest on all that is not marked slow, with
# these arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
set_up
if ! has_gpu; then
    exec .venv/bin/python -m pytest -m "not slow" "$@"
fi
# A GPU's tests carry the mark `gpu`; the others are about CPUs, and see no device.
status=0
CUDA_VISIBLE_DEVICES= .venv/bin/python -m pytest -m "not slow and not gpu" "$@" || status=$?
.venv/bin/python -m pytest -m "not slow and gpu" "$@" || gpu=$?
# 5: none of the tests that were asked for is of that kind.
for result in "$status" "${gpu:-0}"; do
    [[ $result == 0 || $result == 5 ]] || exit "$result"
done
