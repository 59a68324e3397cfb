"""megatron_patch: pretrain language models on patches of tokens first and on single tokens last."""

__version__ = "0.2.0"
