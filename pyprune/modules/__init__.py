"""What is done to an `nn.Module`: find its weights, put masks and gates on, take them off, look at a forward pass.

Masks and gates are put on here whatever they were chosen by: no importance, ratio or schedule has a say.
"""
