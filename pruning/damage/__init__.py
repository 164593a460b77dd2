"""Damage: what pruning does to the model's predictions, measured on text of the calibration.

`masked` turns a dense model into its pruned form for a while, `pruned_model` makes what a plan
writes; `DamageMeter` runs them on rows that no statistic has seen. By what it finds, `auto_plan`
chooses how heads share channels, `with_measured_gain` whether the gain of fewer channels is undone,
and `with_measured_repair` whether a repair stays.
"""
