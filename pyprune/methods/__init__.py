"""What a pruning method is: importance x granularity x scope at a ratio, and the schedules that say when.

Rules in pure tensors and numbers. Nothing here knows a module, finds a weight in a model, or keeps a mask on one.
"""
