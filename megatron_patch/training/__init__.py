"""The training loop and the small rooms around it."""
