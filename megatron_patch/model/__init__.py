"""The language model, from token patches to loss sums. It knows nothing of stages; it takes K from the shape of its input."""
