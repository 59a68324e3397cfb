"""How ranks divide a run among them: the grid of ranks, their process groups, and the collectives of tensor parallelism."""
