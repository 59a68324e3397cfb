"""The model: a list of layers from token patches to loss sums. Nothing here knows about stages, only about the K of its input."""
