#!/usr/bin/env bash
# The main job from a fresh checkout: set up .venv, then `slimstate demo` with these arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
set_up
exec .venv/bin/slimstate demo "$@"
