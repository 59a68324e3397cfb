"""The method as a library: what the training loops of others import. These names are stable.

In: token ids, your model's weights and hidden states, numbers of a plan. Out: patch embeddings, losses, micro-batches, learning rates. Four
parts: the operators, the plan, the stream that reads each token once over all stages, and the collator. DeepSpeed is not imported.

Stable means semantic versions: what `__all__` lists keeps its name, its arguments and its meaning within a major version, and before 1.0
within a minor version. What will be removed or renamed warns (`DeprecationWarning`) for at least one minor version before.
"""

from megatron_patch.data.collate import DocumentMasking
from megatron_patch.errors import MegatronPatchError
from megatron_patch.library.collator import PatchCollator
from megatron_patch.library.operators import linear_multi_token_loss, multi_token_loss, patch_embedding
from megatron_patch.library.optimizer import switch_optimizer
from megatron_patch.library.plan import build_plan, learning_rate
from megatron_patch.library.stream import TokenStream
from megatron_patch.stages import Stage, StagePlan

__all__ = [
    "DocumentMasking",
    "MegatronPatchError",
    "PatchCollator",
    "Stage",
    "StagePlan",
    "TokenStream",
    "build_plan",
    "learning_rate",
    "linear_multi_token_loss",
    "multi_token_loss",
    "patch_embedding",
    "switch_optimizer",
]
