"""Runs an experiment under a list of faults, and says whether each of them left it as if nothing had happened."""
