"""How ranks share a run: the grid of ranks, and what is computed across it."""
