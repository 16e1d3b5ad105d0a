"""What batches tell about a model: sums of gradients and activations that importances need, and adapted BatchNorms.

Here batches go through a model and numbers come out. Which weights go is not decided here, and nothing is masked.
"""
