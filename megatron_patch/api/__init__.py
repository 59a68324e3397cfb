"""The program as Python functions, for notebooks and scripts: what each returns is a record, and what it raises is a `MegatronPatchError`.

In: settings by the names of the command line's flags. Out: plans, runs, models, losses, datasets. Nothing here is needed by the command
line. DeepSpeed is imported by `pretrain` only.
"""

from megatron_patch.requirements import explained_imports

with explained_imports():
    from megatron_patch.api.configuration import load_config
    from megatron_patch.api.datasets import preprocess, train_tokenizer
    from megatron_patch.api.evaluation import evaluate
    from megatron_patch.api.language_model import LanguageModel, load_model
    from megatron_patch.api.planning import plan
    from megatron_patch.api.training import RunResult, each_step, pretrain

__all__ = [
    "LanguageModel",
    "RunResult",
    "each_step",
    "evaluate",
    "load_config",
    "load_model",
    "plan",
    "preprocess",
    "pretrain",
    "train_tokenizer",
]
