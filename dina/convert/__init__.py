"""Released checkpoints and ours: one declarative table per module, used in both directions."""
