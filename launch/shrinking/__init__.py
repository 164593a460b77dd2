"""Shrinking in steps: when channels go while a model is trained, and the folder of its phases."""
