"""Checkpoints: whole or absent, hashed, free of pickle, loadable at any world size; and their way to Hugging Face."""
