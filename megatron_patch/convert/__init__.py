"""Conversion of checkpoints: from and to Hugging Face, from DeepSpeed's merged weights, from Megatron-LM's classic layout."""
