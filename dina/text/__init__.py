"""Text side of the model: the tokenizer."""
