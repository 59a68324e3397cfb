"""Tokenizers of Hugging Face's library `tokenizers`. In: a tokenizer.json, or GPT-2's vocab.json and merges.txt. Out: a tokenizer.

The library reads plain data; code that comes with a model is never run. Special tokens that only the files next to a tokenizer.json name
are added to its vocabulary, as transformers adds them, so that the ids are those of its `PreTrainedTokenizerFast`. Some other classes of
transformers replace parts of a tokenizer.json by their own; here the file counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_patch.errors import DataError
from megatron_patch.tokenizers.interface import Flat, TokenizerOptions, flatten
from megatron_patch.tokenizers.library_errors import LARGEST_ID, MOST_FILE_BYTES, encode_texts, library_errors
from megatron_patch.tokenizers.special_tokens import ROLES, SpecialTokenFiles, choose, read_special_token_files
from megatron_patch.utils.console import shortened
from megatron_patch.utils.files import read_small

_GPT2_EOD = "<|endoftext|>"


@dataclass
class HuggingFaceTokenizer:
    """A tokenizer of the library `tokenizers`."""

    name: str
    backend: Any
    vocab_size: int
    eod_id: int | None
    bos_id: int | None
    no_eod: str = ""
    no_bos: str = ""

    def encode_flat(self, texts: Sequence[str]) -> Flat:
        """Returns the token ids of several texts, without special tokens.

        Raises:
            DataError: the library cannot encode a text.
        """
        return flatten([encoding.ids for encoding in encode_texts(self.name, self._encode, texts)])

    def _encode(self, texts: list[str]) -> Any:
        return self.backend.encode_batch_fast(texts, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, special tokens by their names.

        Raises:
            DataError: the library cannot decode the ids.
        """
        with library_errors(f"{self.name} cannot decode", "a tokenizer that can decode its own ids", "repair the decoder in its file"):
            return str(self.backend.decode([int(token) for token in ids], skip_special_tokens=False))

    def token_text(self, token: int) -> str:
        """Returns the name of a token in the vocabulary."""
        return str(self.backend.id_to_token(token))


def load_hugging_face(options: TokenizerOptions) -> HuggingFaceTokenizer:
    """Loads a tokenizer.json, or a folder that holds one; the files next to it name the special tokens.

    Raises:
        DataError: a file is missing or damaged, or a special token that is named is not in the vocabulary.
    """
    from tokenizers import Tokenizer as Backend

    if options.model is None:
        raise DataError("HuggingFaceTokenizer without --tokenizer-model", "a local file or folder", "give --tokenizer-model")
    path = Path(options.model)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"--tokenizer-model {options.model}: {file} does not exist", "a tokenizer.json or a folder that holds one", "check the path"
        )
    with library_errors(
        f"{file} is not a tokenizer", "a tokenizer.json of Hugging Face's tokenizers", "repair it, or give another --tokenizer-model"
    ):
        text = read_small(file, MOST_FILE_BYTES).decode("utf-8")
        backend = Backend.from_str(text)
        content = orjson.loads(text)
    _check_content(file, content, backend)
    backend.no_truncation()
    backend.no_padding()
    files = read_special_token_files(file.parent)
    _add_tokens(backend, files)
    backend.encode_special_tokens = files.split
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    return _with_special_tokens(str(file), backend, options, files, special)


def _check_content(file: Path, content: Mapping[str, Any], backend: Any) -> None:
    """Checks what the library accepts although it makes ids ambiguous, or random.

    Raises:
        DataError: an added token has another id in the library, or the model drops merges.
    """
    for token in content.get("added_tokens") or []:
        found = backend.token_to_id(token["content"])
        if found != token["id"]:
            raise DataError(
                f"{file} gives the added token {token['content']!r} the id {token['id']}, but the library gives it {found}",
                "added tokens with the next free ids, in their order",
                "repair the file, or give another --tokenizer-model",
            )
    if content["model"].get("dropout"):
        raise DataError(
            f"{file} has a dropout of {content['model']['dropout']}, so that a text has other ids each time",
            "a model without dropout",
            "set model.dropout to null in the file",
        )


def _add_tokens(backend: Any, files: SpecialTokenFiles) -> None:
    """Adds the tokens that only the files next to a tokenizer.json name.

    Raises:
        DataError: a token gets another id than the files give it.
    """
    from tokenizers import AddedToken

    known = {_properties(token) for token in backend.get_added_tokens_decoder().values()}
    for number, token in sorted(files.added.items()):
        added = AddedToken(**token)
        if _properties(added) not in known:
            backend.add_tokens([added])
        found = backend.token_to_id(token["content"])
        if found != number:
            name = shortened(repr(token["content"]))
            raise DataError(
                f"{files.added_path} gives {name} the id {number}, but in the vocabulary of tokenizer.json it is {found}",
                "files of one tokenizer, in which a token has one id",
                "copy all files of the tokenizer again; if they are as published, give the tokenizer.json in a folder of its own, with "
                "--eod-token: texts then hold that token by its letters",
            )
    known_tokens = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    required = {files.names.get("eos_token"), files.names.get("bos_token")}
    for token in files.more:
        # A missing end or beginning token is an error, which `choose` raises; transformers adds it without a word.
        if token["content"] not in known_tokens and not (token["content"] in required and backend.token_to_id(token["content"]) is None):
            backend.add_tokens([AddedToken(**{**token, "special": True})])
    # A token with a role becomes special if the files list it.
    listed = {token["content"] for token in files.added.values()} if files.lists_all else set(known_tokens)
    for name in listed.intersection(filter(None, files.names.values())):
        if name in known_tokens and not known_tokens[name].special:
            known_tokens[name].special = True
            backend.add_tokens([known_tokens[name]])


def _properties(token: Any) -> tuple[Any, ...]:
    return token.content, token.single_word, token.lstrip, token.rstrip, token.normalized, token.special


def _with_special_tokens(
    name: str, backend: Any, options: TokenizerOptions, files: SpecialTokenFiles, special: Sequence[str]
) -> HuggingFaceTokenizer:
    """Returns the tokenizer with the tokens that begin and end its documents.

    Raises:
        DataError: the vocabulary is empty, two tokens have one id, an id is too large, or a special token that is named is missing.
    """
    ids = backend.get_vocab(with_added_tokens=True)
    do = "repair the file, or give another --tokenizer-model"
    if not ids:
        raise DataError(f"{name} has an empty vocabulary", "a trained tokenizer", do)
    if len(set(ids.values())) < len(ids):
        twice = Counter(ids.values()).most_common(1)[0][0]
        names = " and ".join(sorted(repr(token) for token, number in ids.items() if number == twice))
        raise DataError(f"{name}: {names} have the same id, {twice}", "a different id for each token", do)
    if (largest := max(ids.values())) > LARGEST_ID:
        raise DataError(f"{name} has the id {largest}", f"ids up to {LARGEST_ID}", do)
    eod, bos = (choose(role, options, files, ids, special) for role in ROLES)
    return HuggingFaceTokenizer(name, backend, largest + 1, eod.token, bos.token, eod.reason, bos.reason)


def load_gpt2(options: TokenizerOptions) -> HuggingFaceTokenizer:
    """Loads GPT-2's vocab.json and merges.txt, or a tokenizer.json where --tokenizer-model names one.

    Raises:
        DataError: a file is missing or damaged, or a special token that is named is not in the vocabulary.
    """
    merge_file = options.merge_file
    if options.model is not None:
        merge_file = _merges_of(options.model, merge_file)
        if merge_file is None:
            return load_hugging_face(options)
    return _from_merges(options.vocab_file or options.model, merge_file, options)


def _from_merges(vocab_file: str | None, merge_file: str | None, options: TokenizerOptions) -> HuggingFaceTokenizer:
    """Returns the byte-level BPE of GPT-2 with this vocabulary and these merges."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    if vocab_file is None or merge_file is None:
        raise DataError(
            "GPT2BPETokenizer without its files", "--vocab-file vocab.json --merge-file merges.txt", "give --vocab-file and --merge-file"
        )
    with library_errors(f"{vocab_file} and {merge_file} are not a GPT-2 vocabulary", "vocab.json and merges.txt", "check both paths"):
        for path in (vocab_file, merge_file):
            read_small(path, MOST_FILE_BYTES)  # the library allocates whatever a file claims to have
        backend = Backend(models.BPE.from_file(vocab_file, merge_file))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # These files declare nothing special. <|endoftext|> is the end-of-document token of this kind of tokenizer; other names may be text.
    special = [_GPT2_EOD] if backend.token_to_id(_GPT2_EOD) is not None else []
    backend.add_special_tokens(special)
    return _with_special_tokens(vocab_file, backend, options, SpecialTokenFiles(), special)


def _merges_of(model: str, given: str | None) -> str | None:
    """Returns the merges file that belongs to a vocab.json; None where the model is a tokenizer.json or a folder that holds one."""
    path = Path(model)
    if path.is_dir() or path.name == "tokenizer.json":
        return None
    if given is not None:
        return given
    candidates = [
        path.with_name(name)
        for name in ("merges.txt", f"{path.stem.replace('vocab', 'merges')}.txt", f"{path.stem.replace('vocab', 'merge')}.txt")
    ]
    return next((str(file) for file in candidates if file.is_file()), None)
