"""Residual vector quantisation, shared by vision and audio. Knows nothing of either."""
