"""Pruning inside of trainers: Lightning and Hugging Face. Each file needs its library, and is imported by itself."""
