"""dina: training, sampling and evaluation of discrete native multimodal models."""
