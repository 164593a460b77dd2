"""Selection methods by name. To add one, write its file and add its line here."""

from flame.options import option
from pruning.methods.activation_norm import ActivationNorm
from pruning.methods.drrqr import DeltaRuleRRQR
from pruning.methods.interface import Method
from pruning.methods.jrnp import JointRankNorm
from pruning.methods.l1 import L1
from pruning.methods.l2 import L2
from pruning.methods.output_energy import OutputEnergy
from pruning.methods.output_error import OutputError
from pruning.methods.pca import PCA
from pruning.methods.random import Random
from pruning.methods.taylor import Taylor
from pruning.methods.wanda import Wanda

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        DeltaRuleRRQR,
        OutputError,
        Taylor,
        Wanda,
        ActivationNorm,
        L1,
        L2,
        PCA,
        OutputEnergy,
        JointRankNorm,
        Random,
    )
}

__all__ = ["METHODS", "Method", "option"]
