"""Pruned models that run faster: how long ways of doing a thing take, and what takes the place of dense layers."""
