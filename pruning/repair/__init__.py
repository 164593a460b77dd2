"""Repair: new values for tensors that stay, fitted so that a pruned layer gives what it gave.

`pruned_mixers` runs the pruned layers beside the dense ones on the dense model's inputs,
`pruning.statistics.OutputEquations` sums what comes out, and `output_fit` solves for the output
projections. `layer_fit` goes on from there: it keeps what the dense layers take and give
(`layer_calls`) and trains each pruned layer by itself (`local_steps`). New tensors travel with the
plan.
"""
