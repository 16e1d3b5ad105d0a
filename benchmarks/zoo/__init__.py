"""Public architectures, and a judge of what pyprune.shrink makes of them: `make zoo`."""
