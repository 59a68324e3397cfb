"""The stable names: this file imports nothing else of the package, and fails if one vanishes or an argument of it changes."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_patch import library
from megatron_patch.library import (
    DocumentMasking,
    MegatronPatchError,
    PatchCollator,
    Stage,
    StagePlan,
    TokenStream,
    build_plan,
    learning_rate,
    linear_multi_token_loss,
    multi_token_loss,
    patch_embedding,
    switch_optimizer,
)

NAMES = {
    DocumentMasking: "eod_id=None, reset_attention_mask=False, reset_position_ids=False, eod_mask_loss=False, ignore_repeated_eod=False",
    MegatronPatchError: "what, allowed=None, do=None",
    PatchCollator: "patch_size, *, position_weights='uniform', documents=None, side='both'",
    PatchCollator.__call__: "self, rows",
    Stage: "name, patch_size, positions, micro_batch_size, global_batch_size, steps, side='both', position_weights=(), anneal_share=0.0, "
    "lr=<factory>, lr_policy='restart', rewarm_tokens=0, optimizer='reset', blend=None",
    Stage.gradient_accumulation: "self, data_parallel_size",
    Stage.weights_at: "self, stage_step",
    StagePlan: "stages, block_tokens",
    StagePlan.consumed_tokens: "self, progress",
    StagePlan.cost: "self",
    StagePlan.first_step: "self, stage_index",
    StagePlan.from_json: "data",
    StagePlan.progress: "self, step",
    StagePlan.step: "self, progress",
    StagePlan.to_json: "self",
    TokenStream: "plan, data, *, seed=1234, split='1', documents=None, vocab_size=None, rank=0, world_size=1, gradient_accumulation=None",
    TokenStream.load_state_dict: "self, state",
    TokenStream.seek: "self, step",
    TokenStream.state_dict: "self",
    build_plan: "recipe=None, *, train_tokens=None, seq_length, global_batch_size, micro_batch_size=None, gradient_accumulation=None, "
    "world_size=1, patch_size=None, patch_fraction=None, patch_compute_share=None, stages=None, position_weights='uniform', lr=0.0003, "
    "min_lr=0.0, lr_warmup_tokens=0, lr_decay_style=None",
    learning_rate: "plan, tokens",
    linear_multi_token_loss: "hidden, weight, labels, label_weights=None, *, logit_softcap=None, vocab_start=None, group=None, "
    "operators='fused'",
    multi_token_loss: "logits, labels, label_weights=None, *, vocab_start=None, group=None, operators='fused'",
    patch_embedding: "weight, token_ids, *, vocab_start=None, operators='fused'",
    switch_optimizer: "optimizer, stage",
}
"""The arguments that users may give; further ones with a default may follow."""
STAGE_PROPERTIES = (
    "input_patch_size",
    "labels_per_position",
    "sample_tokens",
    "tokens_per_step",
    "positions_per_step",
    "tokens",
    "samples",
)
PLAN_PROPERTIES = ("tokens", "steps")


def arguments(called) -> tuple[list[str], list[str]]:
    """The arguments by position and those by keyword only, each with its default."""
    found = inspect.signature(called).parameters.values()
    words = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in found]
    kinds = [p.kind is p.KEYWORD_ONLY for p in found]
    return [w for w, k in zip(words, kinds, strict=True) if not k], [w for w, k in zip(words, kinds, strict=True) if k]


def test_there_are_at_most_a_dozen_names():
    assert sorted({getattr(library, name) for name in library.__all__}, key=id) == sorted(
        {item for item in NAMES if "." not in item.__qualname__}, key=id
    )
    assert len(library.__all__) <= 12


@pytest.mark.parametrize("item", NAMES, ids=lambda item: item.__qualname__)
def test_arguments_stay(item):
    by_position, _, by_keyword = NAMES[item].partition("*, ")
    # Commas inside of a default's parentheses would cut it.
    first, rest = (text.replace("=()", "=( )").rstrip(", ").split(", ") if text else [] for text in (by_position, by_keyword))
    first = [word.replace("=( )", "=()") for word in first]
    positional, keywords = arguments(item)
    assert positional[: len(first)] == first
    assert set(rest) <= set(keywords)
    added = positional[len(first) :] + [word for word in keywords if word not in rest]
    assert all("=" in word for word in added), f"{added} without a default would break calls"


def test_a_change_of_a_signature_is_seen():
    def learning_rate(plan, tokens, step): ...

    def another(plan, token_count): ...

    assert arguments(learning_rate)[0] != ["plan", "tokens"] and arguments(another)[0] != ["plan", "tokens"]


def test_properties_stay():
    stage = Stage("patch", 4, 16, 2, 2, 10)
    assert [getattr(stage, name) for name in STAGE_PROPERTIES] == [4, 4, 64, 128, 32, 1280, 20]
    assert [getattr(StagePlan((stage,), 64), name) for name in PLAN_PROPERTIES] == [1280, 10]


@pytest.mark.parametrize("name", library.__all__)
def test_each_name_is_documented_with_an_example_that_runs(name):
    item = getattr(library, name)
    text = inspect.getdoc(item)
    assert text and "Args:" in text and "Examples:" in text
    if inspect.isfunction(item):
        assert "Returns:" in text or "-> None" in str(inspect.signature(item)).replace("'", "")
    module = sys.modules[item.__module__]
    (example,) = doctest.DocTestFinder(recurse=False).find(item, name, globs={**vars(module)})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_the_package_is_typed():
    assert (Path(library.__file__).parent.parent / "py.typed").exists()


def test_deepspeed_comes_with_an_extra_only():
    project = (Path(library.__file__).parents[2] / "pyproject.toml").read_text()
    always = project.partition("\ndependencies = [")[2].partition("\n]")[0]
    assert '"torch>=' in always and "deepspeed" not in always


def test_deepspeed_is_neither_needed_nor_loaded():
    """Nor are the packages of the command line and of plots, which take time to import."""
    lines = [
        "import sys",
        "sys.modules['deepspeed'] = None",
        "from megatron_patch.library import *",
        "assert patch_embedding and TokenStream and build_plan",
        "heavy = {'tyro', 'rich', 'matplotlib', 'transformers', 'tokenizers', 'yaml'} & set(sys.modules)",
        "assert not heavy, heavy",
        "build_plan(patch_size=2, train_tokens=512, seq_length=8, global_batch_size=4)",
        "found = [name for name in sys.modules if name.partition('.')[0] == 'deepspeed' and sys.modules[name] is not None]",
        "assert not found, found",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert importlib.util.find_spec("deepspeed") is None or "deepspeed" not in done.stderr
