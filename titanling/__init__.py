"""titanling: a composable, PyTorch-native trainer for Llama-3-style language models."""

__version__ = "0.1.0"
