"""Sweeps: grids over an experiment's config, for `python -m tools.sweep`."""
