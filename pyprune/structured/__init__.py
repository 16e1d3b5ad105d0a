"""What really goes: blocks and experts that are removed, with what refers to them."""
