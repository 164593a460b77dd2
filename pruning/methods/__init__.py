"""Selection methods by name. To add one, write its file and add its line here."""

from pruning.methods.drrqr import DeltaRuleRRQR
from pruning.methods.interface import Method, option
from pruning.methods.l1 import L1
from pruning.methods.random import Random

METHODS: dict[str, type[Method]] = {method.name: method for method in (DeltaRuleRRQR, L1, Random)}

__all__ = ["METHODS", "Method", "option"]
