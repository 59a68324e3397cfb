"""The training loop and what it needs: where a run starts, its data, engine, callbacks, checkpoints, and how faults end it."""
