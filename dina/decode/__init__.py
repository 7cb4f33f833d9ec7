"""Turning hidden states into replies: sampling filters, guidance, prompts and the compiled generation loop."""
