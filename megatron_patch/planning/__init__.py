"""What a run will need before it runs: parameters and memory of each rank, FLOPs, traffic, time, money. No torch, no process group."""
