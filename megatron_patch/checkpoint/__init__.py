"""Checkpoints on disk: the commit protocol, the lock on a run's folder, retention, and reports on what is in a checkpoint."""
