"""Checkpoints of others in, checkpoints for others out: Hugging Face folders, DeepSpeed's merged weights, Megatron's classic layout."""
