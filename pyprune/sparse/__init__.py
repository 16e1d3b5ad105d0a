"""Sparse models in files: ordinary safetensors that hold bits and kept values, written whole and read with checks."""
