"""The model: named sizes, the Llama-3 decoder, its initial weights, text generation, Hugging Face's config."""
