"""Turns text into indexed datasets: worker processes encode documents, and one process keeps them in the order of the input."""
