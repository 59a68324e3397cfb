"""Our model as EleutherAI's lm-evaluation-harness sees one: texts in, log-likelihoods and continuations out, at K = 1.

In: the harness' requests. Out: what its own Hugging Face model answers on the export. Imported only where the harness is installed.
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
    """An adapter.

    Args:
        model: in evaluation mode, on its device.
        tokenizer: of the model, with an end-of-document token.
        max_length: positions of a request; longer contexts lose their beginning.
        batch: requests of one forward pass.
        copies: ranks that share out the requests; all have all answers.
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
        """Id of the end of a document."""
        return self._eod

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text: its beginning, where the vocabulary has a token for it, else the end of the document before."""
        return self._eod if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """For the harness' caches."""
        return self._tokenizer.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Ids of a text; no tokens are added."""
        return encode(self._tokenizer, string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the greedy one) of (text, context, continuation)s."""
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        found = self._shared_out([order[start : start + self._batch] for start in range(0, len(order), self._batch)], requests, self._score)
        return [found[number] for number in range(len(requests))]

    def _shared_out(
        self, batches: Sequence[Sequence[int]], requests: Sequence[Request], answer: Callable[[list[Request]], list[Answer]]
    ) -> dict[int, Answer]:
        """Answers by their requests' numbers; each copy of the model answers some batches."""
        mine: dict[int, Answer] = {}
        for place, numbers in enumerate(batches):
            if self._replicas.owns(place):
                mine.update(zip(numbers, answer([requests[number] for number in numbers]), strict=True))
        return {number: value for part in self._replicas.gather(mine) for number, value in cast("dict[int, Answer]", part).items()}

    def _score(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[tuple[float, bool]]:
        """One forward pass."""
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
        """Log-likelihood of whole texts, each token scored once with as much context as there is."""
        results = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1)
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            results.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a stop text; requests with the same settings are continued together."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=lambda item: str(item[0]))), []).append(number)
        found: dict[int, str] = {}
        for numbers in groups.values():
            settings = dict(requests[numbers[0]].args[1])
            batches = [numbers[start : start + self._batch] for start in range(0, len(numbers), self._batch)]
            found |= self._shared_out(batches, requests, functools.partial(self._continue, settings=settings))
        return [found[number] for number in range(len(requests))]

    def _continue(self, requests: Sequence[Any], settings: dict[str, Any]) -> list[str]:
        contexts = [request.args[0] for request in requests]
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        new_tokens = min(int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or _NEW_TOKENS), self.max_length - 1)
        temperature = float(settings.get("temperature", 0.0) or 0.0) if settings.get("do_sample", True) else 0.0
        sampling = Sampling(temperature, float(settings.get("top_p", 1.0)), int(settings.get("top_k", 0)), seed=1234)
        prompts = [(self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - new_tokens) :] for context in contexts]
        rows = generate(self._model, prompts, new_tokens, sampling, self._eod, ends=self._ends(stops))
        return [_cut(self._tokenizer.decode([token for token in row if token != self._eod]), stops) for row in rows]

    def _ends(self, stops: list[str]) -> Callable[[list[int]], bool]:
        longest = max((len(encode(self._tokenizer, stop)) for stop in stops), default=0)

        def ends(new: list[int]) -> bool:
            text = self._tokenizer.decode(new[-(longest + 8) :])
            return any(stop and stop in text for stop in stops)

        return ends


def _cut(text: str, stops: Sequence[str]) -> str:
    """A text up to its first stop."""
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text
