"""Damage: what a selection does to the model's predictions, measured on text of the calibration.

`masked` turns a dense model into its pruned form for a while, `DamageMeter` runs it on rows that no
statistic has seen, and `auto_plan` chooses by what it finds how heads share channels.
"""
