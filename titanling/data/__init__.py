"""Tokenised text: how it is stored, prepared, ordered and handed to the trainer."""
