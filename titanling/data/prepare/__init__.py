"""From plain text to a tokenizer and token files."""
