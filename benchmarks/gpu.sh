#!/usr/bin/env bash
# All that only a GPU can show, in parts of under ten minutes each, on one page.
#
#   bash benchmarks/gpu.sh OUT [--parts A B …] [--minutes M] [--again] [--rehearse]
#
# What is done is not done again: the same command goes on after an interruption. Uses the python3
# on the path if it has fla and torchtitan, else makes .venv as launch/test.sh does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(command -v python3 || true)
is_complete='import importlib.util as u; exit(not all(map(u.find_spec, ("fla", "torchtitan"))))'
if [[ -z $python ]] || ! "$python" -c "$is_complete" 2>/dev/null; then
    source launch/setup.sh
    set_up
    python=.venv/bin/python
fi
exec "$python" -m benchmarks.gpu "$@"
