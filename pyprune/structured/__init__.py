"""What is coupled, what is dead, and how a model really becomes smaller."""
