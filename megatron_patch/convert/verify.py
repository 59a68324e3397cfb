"""The check of an export: transformers loads the folder, we load the checkpoint, and both read the same tokens.

In: a checkpoint, the folder that was made of it, token ids. Out: how far the logits are apart, in float32. Where the export is in a
16-bit format, our weights are rounded to it first, so that the comparison is as strict as for float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_patch.convert.checkpoint_io import CheckpointWeights
from megatron_patch.convert.tensor_names import parameter_shapes
from megatron_patch.convert.tokenizer_files import tokenizer_of
from megatron_patch.data.corpus import TokenCorpus
from megatron_patch.errors import CheckpointError, ConfigError, DataError
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.shape import ModelShape
from megatron_patch.tokenizers.base import Tokenizer, encode

TOLERANCE = 1e-5
_TEXT = (
    "Reading a book by its chapters first and by its words later is quicker than reading every word twice. In 1984, 3 of 7 printers "
    "(two in Paris, one in Kyoto) said: “We set the type by hand; a page took 40 minutes.” def area(r): return 3.14159 * r ** 2\n"
)
_TEXTS = (
    _TEXT,
    "  two  spaces,\n\ta tab, an end ",
    "naïve café, 日本語, 🙂👍🏽",
    "for i in range(10):\n        x[i] += 1",
    "don't",
    "A\r\nB",
)


@dataclass(frozen=True)
class Verification:
    """The result.

    Args:
        difference: largest absolute difference of logits, over the larger of 1 and the largest logit.
        tokens: how many positions were compared.
        same_choice: share of positions where both find the same token likeliest.
    """

    difference: float
    tokens: int
    same_choice: float


def tokens_to_verify(checkpoint: CheckpointWeights, data_path: str | None, count: int) -> torch.Tensor:
    """Real tokens: of a dataset, by default the one that the run read, or a paragraph by the checkpoint's tokenizer.

    Args:
        checkpoint: whose options name the data.
        data_path: a dataset prefix, or None.
        count: how many at most.

    Returns:
        int64 [1, T].

    Raises:
        ConfigError: neither data nor a tokenizer is known.
        DataError: the data or the tokenizer cannot be read, or does not fit the model.
    """
    options: Any = checkpoint.found.state.config.get("options", {})
    known = [part for part in options.get("data_path") or () if Path(f"{part}.bin").is_file()]
    prefix = data_path or (known[0] if known else None)
    if prefix is not None:
        corpus = TokenCorpus([prefix])
        ids = torch.from_numpy(corpus.read(0, min(count, corpus.num_tokens)))
    else:
        tokenizer = tokenizer_of(checkpoint.data_metadata)
        if tokenizer is None:
            raise ConfigError(
                "--verify without tokens: the run's data is not here", "--verify-data PREFIX", "give it, or leave --verify out"
            )
        ids = torch.tensor(encode(tokenizer, _TEXT)[:count])
    if ids.numel() < 2 or int(ids.max()) >= checkpoint.shape.vocab_size:
        raise DataError(f"{ids.numel()} tokens, ids up to {int(ids.max())}", f"tokens below {checkpoint.shape.vocab_size}")
    return ids.long()[None]


def our_model(checkpoint: CheckpointWeights, dtype: torch.dtype) -> GPTModel:
    """The checkpoint's model in float32 on the CPU, its weights rounded to `dtype`."""
    with torch.device("meta"):
        model = GPTModel(checkpoint.shape)
    state = {name: checkpoint.parameter(name).to(dtype).float() for name in parameter_shapes(checkpoint.shape)}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def positions_to_verify(shape: ModelShape) -> int:
    """How many tokens are compared at most: enough to reach scaled rotary frequencies, no more than the model has learned."""
    return min(shape.max_positions, 1024)


@torch.no_grad()
def verify_export(checkpoint: CheckpointWeights, folder: Path, ids: torch.Tensor, dtype: torch.dtype) -> Verification:
    """Compares logits.

    Args:
        checkpoint: the source.
        folder: the export.
        ids: int64 [B, T].
        dtype: of the export.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: transformers cannot load the export, or the logits are too far apart.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError("--verify without transformers", "the extra [hf]", "pip install 'megatron_patch[hf]'") from error
    try:
        theirs = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load {folder}: {error}", "a folder that it loads") from error
    other = theirs(ids).logits.double()
    del theirs
    mine = our_model(checkpoint, dtype).logits(ids[..., None]).double()
    scale = max(1.0, float(other.abs().max()))
    result = Verification(
        float((mine - other).abs().max()) / scale, ids.numel(), float((mine.argmax(-1) == other.argmax(-1)).double().mean())
    )
    if not result.difference <= TOLERANCE:
        raise CheckpointError(
            f"{folder}: logits differ by {result.difference:.3g} (relative to the largest) on {result.tokens} tokens",
            f"at most {TOLERANCE}",
            "do not use this export, and report it",
        )
    return result


def differing_texts(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Texts of which the export's tokenizer, as transformers loads it, makes other ids than ours; special tokens are left aside.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(f"transformers cannot load the tokenizer of {folder}: {error}", "a tokenizer that it loads") from error
    return [text for text in _TEXTS if theirs(text, add_special_tokens=False)["input_ids"] != encode(tokenizer, text)]
