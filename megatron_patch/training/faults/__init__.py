"""Faults: requests to stop, hangs, rejected steps, ranks that differ, slow ranks, and how all ranks exit together."""
