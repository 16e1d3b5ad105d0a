"""Recipes: YAML files that say in stages how a model is pruned while it is trained.

Here a file becomes pruners of `pyprune.training`, and its mistakes errors with a line. A rule of pruning that a file
is not needed for does not belong here.
"""
