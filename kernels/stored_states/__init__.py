"""The delta rule as an engine decodes it: the state lies in memory between tokens, in few bits."""

from kernels.stored_states.rule import stored_delta_rule
from kernels.stored_states.storage import DTYPES, SCALED, StateStorage

__all__ = ["DTYPES", "SCALED", "StateStorage", "stored_delta_rule"]
