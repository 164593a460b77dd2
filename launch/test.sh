#!/usr/bin/env bash
# The tests from a fresh checkout: set up .venv, then pytest on all that is not marked slow, with
# these arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
set_up
exec .venv/bin/python -m pytest -m "not slow" "$@"
