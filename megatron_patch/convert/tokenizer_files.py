"""The tokenizer's files in a Hugging Face folder: copied from the tokenizer, plus the configuration that transformers needs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_patch.convert.tiktoken_json import tokenizer_json
from megatron_patch.errors import CheckpointError, DataError
from megatron_patch.tokenizers.base import HuggingFaceTokenizer, Tokenizer, load_from_metadata, load_tokenizer, token_text
from megatron_patch.tokenizers.tiktoken import TikTokenizer
from megatron_patch.utils.files import optional_file, reason

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


_MAIN_FILES = {"HuggingFaceTokenizer": "", "GPT2BPETokenizer": "vocab.json", "SentencePieceTokenizer": "tokenizer.model"}
_NEEDED = {
    "HuggingFaceTokenizer": ("tokenizer.json",),
    "GPT2BPETokenizer": ("vocab.json", "merges.txt"),
    "SentencePieceTokenizer": ("tokenizer.model",),
}


def main_file(kind: str) -> str:
    """Returns the file of a folder that `--tokenizer-model` takes for a type of tokenizer; "": the folder itself."""
    return _MAIN_FILES[kind]


def tokenizer_type_of(folder: Path, vocab_size: int) -> tuple[str | None, str | None]:
    """Returns the type of the tokenizer in a folder, and why its files cannot be used; both are None where it has no known tokenizer.

    Args:
        folder: a Hugging Face model's folder.
        vocab_size: vocabulary size of the model.

    Raises:
        CheckpointError: the tokenizer has more ids than the model.
    """
    kind = next((kind for kind, names in _NEEDED.items() if all(os.path.lexists(folder / name) for name in names)), None)
    if kind is None:
        return None, None
    for name in FILES:
        try:
            optional_file(folder / name)
        except OSError as error:
            return None, f"{folder / name} cannot be read: {reason(error)}"
    try:
        tokenizer = load_tokenizer(kind, str(folder / main_file(kind)))
    except DataError as error:
        return None, error.what
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids, but vocab_size in config.json is {vocab_size}",
            f"at most {vocab_size} ids",
            "use the model's own tokenizer, or remove the tokenizer from the folder to import only the weights",
        )
    return kind, None


def tokenizer_of(data_metadata: Mapping[str, Any]) -> Tokenizer | None:
    """Returns the tokenizer that a metadata file names, or None if it names none, or its files are not on this machine.

    Raises:
        DataError: its files are damaged.
        ConfigError: the metadata file does not define how the tokenizer splits text.
    """
    kind, model = data_metadata.get("tokenizer_type"), data_metadata.get("tokenizer_model")
    if not kind or not model or kind == "NullTokenizer" or not Path(str(model)).exists():
        return None
    return load_from_metadata(data_metadata)


def copy_tokenizer(data_metadata: Mapping[str, Any], target: Path) -> list[str]:
    """Writes a tokenizer's files to a Hugging Face folder.

    Args:
        data_metadata: contents of the training data's metadata file.
        target: an existing folder.

    Returns:
        The names of the files; none if the tokenizer is unknown or its files are not on this machine.

    Raises:
        DataError: its files are damaged.
    """
    tokenizer = tokenizer_of(data_metadata)
    if tokenizer is None:
        return []
    source = Path(str(data_metadata["tokenizer_model"]))
    if isinstance(tokenizer, HuggingFaceTokenizer):
        folder = source if source.is_dir() else source.parent
        for name in FILES:
            if _is_there(folder / name):
                shutil.copyfile(folder / name, target / name)
        if not source.is_dir():
            tokenizer.backend.save(str(target / "tokenizer.json"))
    elif isinstance(tokenizer, TikTokenizer):
        tokenizer_json(tokenizer).save(str(target / "tokenizer.json"))
    else:
        shutil.copyfile(source, target / "tokenizer.model")
    config = target / "tokenizer_config.json"
    if not config.is_file():
        config.write_text(json.dumps(_config(tokenizer), indent=2) + "\n", encoding="utf-8")
    return sorted(path.name for path in target.iterdir() if path.name in FILES)


def _is_there(path: Path) -> bool:
    try:
        return optional_file(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}", "a file of the tokenizer", "repair or remove it") from error


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    fast = isinstance(tokenizer, HuggingFaceTokenizer | TikTokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if fast else "LlamaTokenizer",
        "clean_up_tokenization_spaces": False,
        # Otherwise older versions of transformers pass token_type_ids to a model that does not accept them.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for key, token in (("eos_token", tokenizer.eod_id), ("bos_token", tokenizer.bos_id)):
        if token is not None:
            config[key] = token_text(tokenizer, token)
    if not fast:
        config |= {"add_bos_token": False, "add_eos_token": False, "legacy": False}
    return config
