"""Golden cases: what the reference computes, recomputed by our modules from the released names and layouts."""
