"""The operators of the method, fastest form first: fused kernels where they are built, plain formulas elsewhere."""

from megatron_patch.ops.plain import IGNORE_INDEX, multi_token_loss, patch_embedding

__all__ = ["IGNORE_INDEX", "multi_token_loss", "patch_embedding"]
