"""Command lines of the tools: what their flags have in common, and `convert_checkpoint`."""
