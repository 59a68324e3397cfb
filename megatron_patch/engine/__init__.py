"""Everything that touches DeepSpeed: its JSON, initialisation, the optimizer, and engines behind one small interface."""
