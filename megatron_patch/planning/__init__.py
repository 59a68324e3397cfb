"""Predicts what a run needs: parameters and memory of each rank, FLOPs, traffic, time and money. Needs no process group."""
