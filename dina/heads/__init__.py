"""Depth transformers that turn one hidden state into the codes of one image cell or audio frame."""
