"""Verifies an export: compares the logits of transformers on the export with those of the checkpoint, on the same tokens.

In: a checkpoint, its export, token ids. Out: the difference of the logits, in float32. For an export with 16-bit weights, the checkpoint's
weights are rounded to the same dtype first, so that the comparison is as strict as for float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_patch.convert.checkpoint_io import CheckpointWeights
from megatron_patch.convert.tensor_names import is_state, parameter_shapes
from megatron_patch.convert.tokenizer_files import tokenizer_of
from megatron_patch.data.corpus import TokenCorpus
from megatron_patch.errors import CheckpointError, ConfigError, DataError
from megatron_patch.model.gpt import GPTModel
from megatron_patch.model.shape import ModelShape
from megatron_patch.requirements import missing_package
from megatron_patch.tokenizers.base import Tokenizer, encode
from megatron_patch.utils.units import plural

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
    """The result of a verification.

    Args:
        difference: largest absolute difference of logits, divided by the larger of 1 and the largest absolute logit.
        tokens: number of positions compared.
        same_choice: fraction of positions where both models have the same most likely token.
    """

    difference: float
    tokens: int
    same_choice: float


def tokens_to_verify(checkpoint: CheckpointWeights, data_path: str | None, count: int) -> torch.Tensor:
    """Returns tokens of real text: of a dataset, or else a paragraph encoded with the checkpoint's tokenizer.

    Args:
        checkpoint: the checkpoint.
        data_path: a dataset prefix; None: the run's training data, if it is on this machine.
        count: largest number of tokens.

    Returns:
        int64 [1, T].

    Raises:
        ConfigError: neither the data nor the tokenizer is on this machine.
        DataError: the data or the tokenizer cannot be read, or has ids outside of the model's vocabulary.
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
                "--verify has no tokens: neither the run's data nor its tokenizer is on this machine",
                "a dataset as --verify-data PREFIX",
                "give --verify-data, or remove --verify",
            )
        ids = torch.tensor(encode(tokenizer, _TEXT)[:count])
    if ids.numel() < 2 or int(ids.max()) >= checkpoint.shape.vocab_size:
        found = f"{plural(ids.numel(), 'token')} with ids up to {int(ids.max())}" if ids.numel() else "no tokens"
        raise DataError(
            f"--verify found {found}",
            f"at least 2 tokens with ids below {checkpoint.shape.vocab_size}",
            "give other data with --verify-data",
        )
    return ids.long()[None]


def float32_model(checkpoint: CheckpointWeights, dtype: torch.dtype) -> GPTModel:
    """Returns the checkpoint's model in float32 on the CPU, with weights rounded to `dtype`."""
    with torch.device("meta"):
        model = GPTModel(checkpoint.shape)
    state = {
        name: checkpoint.parameter(name).to(torch.float32 if is_state(name) else dtype).float()
        for name in parameter_shapes(checkpoint.shape)
    }
    model.load_state_dict(state, strict=True, assign=True)
    return model.to("cpu").eval()  # the counts of experts leave the meta device


def positions_to_verify(shape: ModelShape) -> int:
    """Returns the number of tokens to compare: enough to test scaled rotary frequencies, and at most the model's positions."""
    return min(shape.max_positions, 1024)


@torch.no_grad()
def verify_export(checkpoint: CheckpointWeights, folder: Path, ids: torch.Tensor, dtype: torch.dtype) -> Verification:
    """Compares the logits of an export with those of its checkpoint.

    Args:
        checkpoint: the checkpoint.
        folder: the export.
        ids: int64 [B, T].
        dtype: dtype of the export's weights.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: transformers cannot load the export, or the logits differ by more than the tolerance.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise missing_package("transformers", "--verify") from error
    try:
        theirs = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"transformers cannot load {folder}: {error}", "a folder that it loads", "update transformers, or report this"
        ) from error
    if checkpoint.shape.experts is not None and hasattr(theirs, "set_experts_implementation"):
        theirs.set_experts_implementation("eager")  # the default of transformers 5 takes rows of 16-byte multiples only
    expected = theirs(ids).logits.double()
    del theirs
    found = float32_model(checkpoint, dtype).logits(ids[..., None]).double()
    scale = max(1.0, float(expected.abs().max()))
    result = Verification(
        float((found - expected).abs().max()) / scale, ids.numel(), float((found.argmax(-1) == expected.argmax(-1)).double().mean())
    )
    if not result.difference <= TOLERANCE:
        raise CheckpointError(
            f"{folder}: logits differ by {result.difference:.3g} (relative to the largest) on {plural(result.tokens, 'token')}",
            f"a difference of at most {TOLERANCE}",
            "do not use this export, and report it",
        )
    return result


def differing_texts(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """Returns the test texts for which the export's tokenizer in transformers gives other ids than `tokenizer`, without special tokens.

    Raises:
        CheckpointError: transformers cannot load the export's tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise CheckpointError(
            f"transformers cannot load the tokenizer of {folder}: {error}", "a tokenizer that transformers loads"
        ) from error
    return [text for text in _TEXTS if theirs(text, add_special_tokens=False)["input_ids"] != encode(tokenizer, text)]
