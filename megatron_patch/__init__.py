"""megatron_patch: pretrain language models on patches of tokens first and on single tokens last."""

__version__ = "0.1.0"

PROJECT = "megatron_patch: patches of tokens first, single tokens last"
"""Tells this package from Alibaba's Pai-Megatron-Patch, whose Python package has the same name."""
