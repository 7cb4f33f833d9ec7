"""Benchmarks: ours and a peer interleaved in one process tree."""
