"""The language model: token patches in, loss sums out. It does not depend on stages; it takes K from the shape of its input."""
