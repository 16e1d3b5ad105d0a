"""From scores to masks: which units of a model's weights stay, and `prune`, which masks the others.

One choice, made once. What chooses again and again during a training is in `pyprune.training`; the rules by which
it is made are in `pyprune.methods`.
"""
