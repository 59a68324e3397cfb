"""The tokenizer's files beside a model's weights: copied from where the tokenizer is, completed by what transformers needs to load them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_patch.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer

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


def tokenizer_of(data_info: Mapping[str, Any]) -> Tokenizer | None:
    """The tokenizer that a side file names, or None where there is none of text, or its files are not on this machine.

    Raises:
        DataError: its files are broken.
    """
    kind, model = data_info.get("tokenizer_type"), data_info.get("tokenizer_model")
    if not kind or not model or kind == "NullTokenizer" or not Path(str(model)).exists():
        return None
    return load_tokenizer(kind, model)


def copy_tokenizer(data_info: Mapping[str, Any], target: Path) -> list[str]:
    """Puts a tokenizer's files into a folder of Hugging Face's layout.

    Args:
        data_info: a side file's contents.
        target: an existing folder.

    Returns:
        Names of the files, none where the tokenizer is not known or not here.

    Raises:
        DataError: its files are broken.
    """
    tokenizer = tokenizer_of(data_info)
    if tokenizer is None:
        return []
    source = Path(str(data_info["tokenizer_model"]))
    if isinstance(tokenizer, HuggingFaceTokenizer):
        folder = source if source.is_dir() else source.parent
        for name in FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, target / name)
        tokenizer.backend.save(str(target / "tokenizer.json")) if not source.is_dir() else None
    else:
        shutil.copyfile(source, target / "tokenizer.model")
    config = target / "tokenizer_config.json"
    if not config.is_file():
        config.write_text(json.dumps(_config(tokenizer), indent=2) + "\n", encoding="utf-8")
    return sorted(path.name for path in target.iterdir() if path.name in FILES)


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    fast = isinstance(tokenizer, HuggingFaceTokenizer)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast" if fast else "LlamaTokenizer",
        "clean_up_tokenization_spaces": False,
        # Older versions of transformers would hand token_type_ids to a model that takes none.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    backend: Any = getattr(tokenizer, "backend", None)
    for key, token in (("eos_token", tokenizer.eod_id), ("bos_token", tokenizer.bos_id)):
        if token is not None:
            config[key] = backend.id_to_token(token) if fast else backend.id_to_piece(token)
    if not fast:
        config |= {"add_bos_token": False, "add_eos_token": False, "legacy": False}
    return config
