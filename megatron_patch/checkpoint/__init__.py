"""What surrounds the commit protocol of `commit`: who may write a run's folder, what is kept, what is in a checkpoint."""
