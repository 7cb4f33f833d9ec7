"""Accelerator kernels, one folder per operation, each with a plain JAX form of the same signature. Knows nothing of dina."""
