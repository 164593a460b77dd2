"""Repair: new values for tensors that stay, fitted so that a pruned layer gives what it gave.

`pruned_mixers` runs the pruned layers beside the dense ones on the dense model's inputs,
`pruning.statistics.OutputEquations` sums what comes out, and `output_fit` solves for the output
projections, which travel with the plan.
"""
