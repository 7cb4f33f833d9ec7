"""The laboratory: `python -m tools.sweep --config=experiments/sweeps/X.py[:variant] --workdir=DIR` trains and measures a grid."""
