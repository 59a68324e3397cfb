"""Adapter from `InferenceModel` to the model interface of EleutherAI's lm-evaluation-harness, at K = 1.

In: requests of the harness. Out: log-likelihoods and continuations, equal to those of the harness' Hugging Face model on the exported
checkpoint. This module needs the harness, so it is imported only when tasks run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_patch.model.generate import Sampling, generate
from megatron_patch.model.inference_model import InferenceModel
from megatron_patch.parallel.groups import SINGLE_REPLICA, Replicas
from megatron_patch.tokenizers.base import Tokenizer, encode

_NEW_TOKENS = 256
Request = TypeVar("Request")
Answer = TypeVar("Answer")


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model that answers the requests of the harness.

    Args:
        model: the model, in evaluation mode and on its device.
        tokenizer: tokenizer of the model, with an end-of-document token.
        max_length: longest request, in positions; longer contexts lose their beginning.
        batch: requests per forward pass.
        replicas: replicas of the model that divide the requests; every rank gets all answers.
    """

    def __init__(
        self, model: InferenceModel, tokenizer: Tokenizer, max_length: int, batch: int, replicas: Replicas = SINGLE_REPLICA
    ) -> None:
        super().__init__()
        assert tokenizer.eod_id is not None
        self._model, self._tokenizer, self.max_length, self._batch, self._replicas = model, tokenizer, max_length, batch, replicas
        self._eod = tokenizer.eod_id
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-document token."""
        return self._eod

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before a text: the beginning-of-text token if the vocabulary has one, else the end-of-document token."""
        return self._eod if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, as the harness uses it in its caches."""
        return self._tokenizer.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Returns the token ids of a text; no special tokens are added."""
        return encode(self._tokenizer, string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any) -> list[tuple[float, bool]]:
        """Returns (log-likelihood of the continuation, whether greedy decoding yields it) for each (text, context, continuation)."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        answers = self._divide([order[start : start + self._batch] for start in range(0, len(order), self._batch)], requests, self._score)
        return [answers[number] for number in range(len(requests))]

    def _divide(
        self, batches: Sequence[Sequence[int]], requests: Sequence[Request], answer: Callable[[list[Request]], list[Answer]]
    ) -> dict[int, Answer]:
        """Returns the answers by index of their request; each replica of the model answers some of the batches."""
        mine: dict[int, Answer] = {}
        for index, numbers in enumerate(batches):
            if self._replicas.owns(index):
                mine.update(zip(numbers, answer([requests[number] for number in numbers]), strict=True))
        return {number: value for part in self._replicas.gather(mine) for number, value in cast("dict[int, Answer]", part).items()}

    def _score(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Returns log-likelihoods and greediness of requests, computed in one forward pass."""
        rows = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        ids = torch.zeros(len(rows), max(len(row) for row in rows) - 1, dtype=torch.int64)
        for line, row in zip(ids, rows, strict=True):
            line[: len(row) - 1] = torch.tensor(row[:-1])
        logits = self._model.logits(ids.to(self._device)[..., None])
        results = []
        for (_, _, continuation), row, line in zip(requests, rows, logits, strict=True):
            count = min(len(continuation), len(row) - 1)
            scores = line[len(row) - 1 - count : len(row) - 1].float().log_softmax(-1)
            targets = torch.tensor(row[len(row) - count :], device=scores.device)
            total = float(scores.gather(-1, targets[:, None]).sum())
            results.append((total, bool((scores.argmax(-1) == targets).all())))
        return results

    def loglikelihood_rolling(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of complete texts; each token is scored once with the longest possible context."""
        results = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            results.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns continuations up to a stop text; requests with the same settings share batches."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=lambda item: str(item[0]))), []).append(number)
        answers: dict[int, str] = {}
        for numbers in groups.values():
            settings = dict(requests[numbers[0]].args[1])
            batches = [numbers[start : start + self._batch] for start in range(0, len(numbers), self._batch)]
            answers |= self._divide(batches, requests, functools.partial(self._continue, settings=settings))
        return [answers[number] for number in range(len(requests))]

    def _continue(self, requests: Sequence[Any], settings: dict[str, Any]) -> list[str]:
        contexts = [request.args[0] for request in requests]
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        new_tokens = min(int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or _NEW_TOKENS), self.max_length - 1)
        temperature = float(settings.get("temperature", 0.0) or 0.0) if settings.get("do_sample", True) else 0.0
        sampling = Sampling(temperature, float(settings.get("top_p", 1.0)), int(settings.get("top_k", 0)), seed=1234)
        prompts = [(self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - new_tokens) :] for context in contexts]
        rows = generate(self._model, prompts, new_tokens, sampling, self._eod, ends=self._ends(stops))
        return [_until_stop(self._tokenizer.decode([token for token in row if token != self._eod]), stops) for row in rows]

    def _ends(self, stops: list[str]) -> Callable[[list[int]], bool]:
        longest = max((len(encode(self._tokenizer, stop)) for stop in stops), default=0)

        def ends(new: list[int]) -> bool:
            text = self._tokenizer.decode(new[-(longest + 8) :])
            return any(stop and stop in text for stop in stops)

        return ends


def _until_stop(text: str, stops: Sequence[str]) -> str:
    """Returns the part of a text before the first stop text."""
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text
