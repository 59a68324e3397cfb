"""Turns token files into micro-batches: indexed datasets, the block stream that the stages share, patch samples, the loader."""
