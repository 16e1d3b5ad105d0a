"""What goes on during a training: pruners, schedulers, losses that train gates, and the keeping of zeros.

Each turns the same screws as one call of `prune`, step by step. Callbacks for the trainers of other libraries are in
`pyprune.integrations`, and nothing here reads files.
"""
