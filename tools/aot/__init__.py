"""The TPU compiler on a CPU machine: does a train step fit a pod, what does it send, and how fast can it be?"""
