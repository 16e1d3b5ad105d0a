"""What pruning does to a model: how far its score falls, weight by weight, and which ratios follow from that.

Here a model is pruned to be measured, and is as before in the end. What leaves masks in it, or trains it, is
elsewhere.
"""
