"""The command line: checkpoints pruned, measured and compressed from the shell."""
