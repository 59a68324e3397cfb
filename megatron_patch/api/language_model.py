"""A trained model in this process: logits, losses at any patch size, and text. In: a checkpoint of any layout. Out: `LanguageModel`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, overload

from megatron_patch.api.arguments import path, real, whole
from megatron_patch.api.own_parts import MakeModel, name_of
from megatron_patch.errors import ConfigError
from megatron_patch.model.own_model import OwnModel, OwnModelForInference
from megatron_patch.model.shape import ModelShape
from megatron_patch.tokenizers.base import Tokenizer, encode, prompt_ids, tokenizer_of_checkpoint, without_eod
from megatron_patch.utils.units import plural

if TYPE_CHECKING:
    import torch

    from megatron_patch.engine.inference import LoadedModel

Ids = Union[Sequence[int], Sequence[Sequence[int]], "torch.Tensor", str]


def load_model(
    checkpoint: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    model: MakeModel | None = None,
    tokenizer_type: str | None = None,
    tokenizer_model: str | os.PathLike[str] | None = None,
) -> LanguageModel:
    """Loads the model of a checkpoint into this process, whatever layout wrote it.

    Args:
        checkpoint: a run's folder, of which the newest valid checkpoint is taken, or one of its step-N folders.
        device: the device; None: the first GPU, or the CPU.
        dtype: dtype of the weights; None: float32.
        model: the function that built the model, if the run had one of its own (`pretrain(…, model=…)`).
        tokenizer_type: kind of tokenizer; None: that of the training data.
        tokenizer_model: the tokenizer's file or folder, if it has moved.

    Raises:
        CheckpointError: there is no valid checkpoint, or it was trained with another model.
    """
    import torch

    from megatron_patch.engine.inference import default_device, load_own_model
    from megatron_patch.engine.inference import load_model as load

    folder, kind = path("checkpoint", checkpoint), torch.float32 if dtype is None else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise ConfigError(f"dtype={dtype!r}", "torch.float32, torch.bfloat16 or torch.float16", "give a dtype of torch")
    try:
        where = default_device() if device is None else torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device={str(device)!r}: {reason}", "a device of this machine, such as cpu or cuda:0", "leave it out") from error
    loaded: LoadedModel[Any]
    if model is None:
        loaded = load(folder, where, kind)
    else:
        loaded = load_own_model(OwnModel(name_of(model, "model"), model), folder, where, kind)
    return LanguageModel(loaded, tokenizer_type, None if tokenizer_model is None else path("tokenizer_model", tokenizer_model))


class LanguageModel:
    """A trained model; `load_model` makes it.

    Token ids can be given as a list, a list of lists of one length, or a tensor [T] or [B, T]; where there is a tokenizer, also as a text.

    Args:
        loaded: the model and its checkpoint.
        tokenizer_type: kind of tokenizer; None: that of the training data.
        tokenizer_model: the tokenizer's file or folder; None: that of the training data.
    """

    def __init__(self, loaded: LoadedModel[Any], tokenizer_type: str | None = None, tokenizer_model: str | None = None) -> None:
        self.loaded = loaded
        self._tokenizer_type, self._tokenizer_model = tokenizer_type, tokenizer_model

    def __repr__(self) -> str:
        shape = self.shape
        return f"LanguageModel({plural(shape.num_layers, 'layer')} x {shape.hidden_size}, step {self.step:,} of {self.checkpoint.parent})"

    @property
    def shape(self) -> ModelShape:
        """The model's shape."""
        shape: ModelShape = self.loaded.model.shape
        return shape

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint that was loaded."""
        return self.loaded.checkpoint.folder

    @property
    def step(self) -> int:
        """Optimizer steps that the model was trained for."""
        return self.loaded.checkpoint.state.step

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        device: torch.device = self.loaded.model.device
        return device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: the one given, else that of the training data.

        Raises:
            ConfigError: none is known, or it has more ids than the model.
            DataError: its files are missing or damaged.
        """
        metadata = self.loaded.data_metadata or {}
        return tokenizer_of_checkpoint(metadata, self._tokenizer_type, self._tokenizer_model, self.shape.vocab_size)

    @property
    def tokenizer_flags(self) -> list[str]:
        """The flags of the tools that name the tokenizer; none if it is that of the training data."""
        flags = {"--tokenizer-type": self._tokenizer_type, "--tokenizer-model": self._tokenizer_model}
        return [word for flag, value in flags.items() if value is not None for word in (flag, value)]

    def logits(self, ids: Ids, patch_size: int = 1) -> torch.Tensor:
        """Returns the logits of the tokens that follow each position.

        Args:
            ids: token ids, a multiple of `patch_size` of them in each row.
            patch_size: K; each position is a patch of K tokens, and its logits are those of all K tokens of the next patch.

        Returns:
            float32 [T/K, V] for one row of T ids, [B, T/K, V] for several.

        Raises:
            ConfigError: an id is not in the vocabulary, or the number of ids does not fit.
        """
        import torch

        patch_size = whole("patch_size", patch_size, 1)
        rows, single = self._rows(ids)
        if rows.shape[1] % patch_size:
            raise ConfigError(
                f"{plural(rows.shape[1], 'token')} in patches of {patch_size}",
                f"a multiple of {patch_size}",
                f"leave out the last {plural(rows.shape[1] % patch_size, 'token')}",
            )
        with torch.no_grad():
            result: torch.Tensor = self.loaded.model.logits(rows.view(len(rows), -1, patch_size)).float()
        return result[0] if single else result

    def loss(self, ids: Ids, patch_size: int = 1) -> float:
        """Returns the mean loss of the tokens after the first patch, which has no context.

        Args:
            ids: token ids, more than `patch_size` of them in each row. The last patch may be incomplete.
            patch_size: K; 1 is the loss of an ordinary language model.

        Returns:
            Nats per token.

        Raises:
            ConfigError: an id is not in the vocabulary, or there are too few.
        """
        import torch

        from megatron_patch.ops import IGNORE_INDEX

        patch_size = whole("patch_size", patch_size, 1)
        rows, _ = self._rows(ids)
        if rows.shape[1] <= patch_size:
            raise ConfigError(
                f"{plural(rows.shape[1], 'token')} in patches of {patch_size}, of which the first is not scored",
                f"at least {patch_size + 1} tokens",
                "give a longer text",
            )
        patches = torch.nn.functional.pad(rows, (0, -rows.shape[1] % patch_size), value=IGNORE_INDEX).view(len(rows), -1, patch_size)
        with torch.no_grad():
            loss_sum, count = self.loaded.model(patches[:, :-1], patches[:, 1:])
        return float(loss_sum) / float(count)

    @overload
    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.8,
        top_p: float = 0.95,
        top_k: int = 0,
        seed: int | None = None,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.8,
        top_p: float = 0.95,
        top_k: int = 0,
        seed: int | None = None,
    ) -> list[int]: ...

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 128,
        *,
        temperature: float = 0.8,
        top_p: float = 0.95,
        top_k: int = 0,
        seed: int | None = None,
    ) -> str | list[int]:
        """Continues a prompt, token by token, until the end-of-document token or the largest number of tokens.

        Args:
            prompt: a text, or token ids; an empty text stands for the start of a document.
            max_new_tokens: largest number of tokens to add.
            temperature: divisor of the logits; 0 chooses the most likely token.
            top_p: sample from the smallest set of tokens with this probability mass.
            top_k: sample from this number of most likely tokens; 0: from all.
            seed: seed of the sampling; None: a new one each time.

        Returns:
            The continuation without the prompt: a text for a text, ids for ids.

        Raises:
            ConfigError: a setting is out of range, or no tokenizer is known for a text.
        """
        from megatron_patch.model.generate import Sampling

        max_new_tokens = whole("max_new_tokens", max_new_tokens, 0)
        chosen = None if seed is None else whole("seed", seed, 0)
        sampling = Sampling(real("temperature", temperature), real("top_p", top_p), whole("top_k", top_k, 0), chosen)
        sampling.check()
        if isinstance(prompt, str):
            new = self._continue(prompt_ids(self.tokenizer, prompt), max_new_tokens, sampling, self.tokenizer.eod_id)
            return self.tokenizer.decode(without_eod(self.tokenizer, new))
        rows, _ = self._rows(prompt)
        if len(rows) > 1:
            raise ConfigError(f"{len(rows)} rows as the prompt", "one text, or the ids of one row", "call generate once for each row")
        metadata = self.loaded.data_metadata or {}
        return self._continue(rows[0].tolist(), max_new_tokens, sampling, metadata.get("eod_id"))

    def _continue(self, ids: list[int], new_tokens: int, sampling: Any, eod_id: int | None) -> list[int]:
        from megatron_patch.model.generate import generate, generate_without_cache

        model = self.loaded.model
        if not isinstance(model, OwnModelForInference):
            return generate(model, [ids], new_tokens, sampling, eod_id)[0]
        learned = self.shape.learned_positions
        return generate_without_cache(
            lambda rows: model.logits(rows[..., None]), [ids], new_tokens, sampling, eod_id, self.device, learned
        )[0]

    def _rows(self, ids: Ids) -> tuple[torch.Tensor, bool]:
        """Returns ids as int64 [B, T] on the device, and whether one row was given."""
        import torch

        if isinstance(ids, str):
            ids = encode(self.tokenizer, ids)
        try:
            given = torch.as_tensor(ids)
            if given.numel() and (given.dtype is torch.bool or given.is_floating_point() or given.is_complex()):
                raise ConfigError(f"the token ids are of type {given.dtype}", "whole numbers", "give the ids as integers")
            rows = given.to(self.device, torch.int64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"the token ids are no table: {error}",
                "one text, ids [T], or ids [B, T] with rows of one length",
                "give rows of one length; give several texts one by one",
            ) from error
        single = rows.dim() == 1
        rows = rows[None] if single else rows
        if rows.dim() != 2 or rows.numel() == 0:
            raise ConfigError(f"token ids of shape {list(rows.shape)}", "[T] or [B, T], at least one", "give at least one token")
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= self.shape.vocab_size:
            raise ConfigError(
                f"token id {low if low < 0 else high}",
                f"0 to {self.shape.vocab_size - 1}, the model's vocabulary",
                "encode with the model's tokenizer",
            )
        return rows, single
