"""One shot: a trained model pruned block by block over a little data, with solvers that repair what is left."""
