"""The training data of a plan for loops that are not this program's: each token once over all stages, resumable by two numbers.

In: a plan, a dataset or an array of tokens, this rank. Out: micro-batches as dictionaries of tensors, in the order of the steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import IterableDataset, get_worker_info

from megatron_patch.data.array_corpus import ArrayCorpus
from megatron_patch.data.collate import DocumentMasking
from megatron_patch.data.corpus import Corpus, check_vocabulary, open_corpus
from megatron_patch.data.loader import PatchLoader
from megatron_patch.data.token_stream import TrainStream
from megatron_patch.errors import ConfigError, DataError
from megatron_patch.library.collator import as_dictionary
from megatron_patch.stages import Progress, StagePlan

Data = str | os.PathLike[str] | Mapping[str, float] | npt.NDArray[Any] | torch.Tensor


class TokenStream(IterableDataset[dict[str, torch.Tensor]]):
    """This rank's micro-batches of a plan, stage after stage: within an epoch every token is an input exactly once over all stages.

    The order depends on data, plan and seed only, and is computed, not stored: on any number of ranks a step reads the same samples. A
    thread prepares two steps in advance. Iterate over it, or give it to `DataLoader(stream, batch_size=None)`: each item is a whole
    micro-batch, so the loader must neither batch nor shuffle nor start workers.

    Two numbers resume it: `state_dict()` has the stage and the steps of it that are done, `load_state_dict()` takes them. A step
    counts as done when its last micro-batch is given out, since gradients of a part of a step are in no checkpoint. Trainers that fetch
    batches in advance (accelerate, Lightning) resume by their own count of steps: `seek(step)`. A further iteration continues where the
    last one stood; `seek(0)` begins again.

    Args:
        plan: the stages.
        data: the prefix of a dataset (PREFIX.bin and PREFIX.idx), several prefixes with their weights, or token ids, whole numbers [N].
        seed: random seed of the order.
        split: relative sizes of the parts for training, validation and test, as 969,30,1; by default all data is for training.
        documents: how documents are kept apart; None: they are not.
        vocab_size: all token ids must be below this; None: they are not checked.
        rank: this rank among those that read different samples.
        world_size: number of these ranks.
        gradient_accumulation: micro-batches of a step, where the trainer fixes them; every stage must have this number. None: it differs
            between stages, see `Stage.gradient_accumulation`.

    Raises:
        ConfigError: a stage has another number of micro-batches, or the rank is out of range.
        DataError: the data is missing, damaged or too small for the plan.

    Examples:
        >>> import torch
        >>> from megatron_patch.library import build_plan
        >>> plan = build_plan(patch_size=2, train_tokens=128, patch_fraction=0.5, seq_length=8, global_batch_size=4, micro_batch_size=2)
        >>> stream = TokenStream(plan, torch.arange(400) % 100, vocab_size=100)
        >>> [tuple(batch["input_ids"].shape) for batch in stream]
        [(2, 8, 2), (2, 8, 2), (2, 8, 1), (2, 8, 1), (2, 8, 1), (2, 8, 1)]
        >>> stream.state_dict()
        {'stage_index': 1, 'stage_step': 2}
    """

    def __init__(
        self,
        plan: StagePlan,
        data: Data,
        *,
        seed: int = 1234,
        split: str = "1",
        documents: DocumentMasking | None = None,
        vocab_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        gradient_accumulation: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of {world_size}", "a rank from 0 and below world_size", "give this process' rank")
        self.plan, self.documents = plan, documents or DocumentMasking()
        if self.documents.eod_id is None and (self.documents.needs_documents or self.documents.ignore_repeated_eod):
            raise ConfigError("documents are kept apart without eod_id", "the id of the end-of-document token", "give eod_id")
        self._rank, self._world_size, self._vocab_size = rank, world_size, vocab_size
        for stage in plan.stages:
            count = stage.gradient_accumulation(world_size)
            if gradient_accumulation not in (None, count):
                raise ConfigError(
                    f"stage {stage.name!r} has {count} micro-batches in a step, and the trainer accumulates {gradient_accumulation}: a "
                    "switch would be in the middle of an accumulation",
                    "the same number in every stage",
                    f"build the plan with build_plan(…, gradient_accumulation={gradient_accumulation}, world_size={world_size})",
                )
        corpora, blend = _open(data, vocab_size)
        self._stream = TrainStream(plan, corpora, blend, split, seed)
        self._step = 0

    @property
    def notes(self) -> list[str]:
        """Sentences on what may surprise, such as data that is read more than once."""
        return self._stream.notes()

    def seek(self, step: int) -> None:
        """Continues after so many steps of the plan, in the next iteration.

        Args:
            step: steps that are done, over all stages.

        Raises:
            ConfigError: the plan has fewer steps.
        """
        self.plan.progress(step)
        self._step = step

    def state_dict(self) -> dict[str, int]:
        """Returns the two numbers: stage_index, and stage_step, the steps of this stage whose batches have all been given out."""
        progress = self.plan.progress(self._step)
        return {"stage_index": progress.stage_index, "stage_step": progress.stage_step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from what `state_dict` returned, in the next iteration.

        Raises:
            ConfigError: the plan has fewer stages, or the stage fewer steps.
        """
        index, step, stages = state["stage_index"], state["stage_step"], self.plan.stages
        if not 0 <= index < len(stages) or not 0 <= step <= stages[index].steps:
            raise ConfigError(
                f"stage_index {index} with stage_step {step}",
                f"the {len(stages)} stages from 0, which have {', '.join(str(stage.steps) for stage in stages)} steps",
                "use the plan of the run that was saved",
            )
        self.seek(self.plan.step(Progress(index, step)))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the micro-batches from here to the end of the plan, as dictionaries of `PatchCollator`.

        Raises:
            ConfigError: a worker of a data loader iterates.
            DataError: the data cannot be read, or has an id outside of the vocabulary.
        """
        if (worker := get_worker_info()) is not None:
            raise ConfigError(
                f"a data loader with {worker.num_workers} workers iterates over the stream, and each worker would read every token",
                "num_workers=0: the stream prepares batches in a thread of its own",
                "write DataLoader(stream, batch_size=None, num_workers=0)",
            )
        return self._batches()

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        step = self._step
        while step < self.plan.steps:
            progress = self.plan.progress(step)
            stage = self.plan.stages[progress.stage_index]
            ranks = (self._rank, self._world_size)
            loader = PatchLoader(
                self._stream, progress.stage_index, *ranks, self.documents, progress.stage_step, vocab_size=self._vocab_size
            )
            try:
                for stage_step in range(progress.stage_step, stage.steps):
                    weights = torch.tensor(stage.weights_at(stage_step), dtype=torch.float32)
                    batches = loader.next_step()
                    step += 1
                    for number, batch in enumerate(batches, start=1):
                        if number == len(batches):
                            self._step = step
                        yield as_dictionary(batch, weights, self.documents)
            finally:
                loader.close()


def _open(data: Data, vocab_size: int | None) -> tuple[dict[str, Corpus], tuple[tuple[str, float], ...]]:
    """Returns the corpora by name, and the weight of each."""
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().numpy()
    if isinstance(data, np.ndarray):
        return {"array": ArrayCorpus(data)}, (("array", 1.0),)
    if not isinstance(data, (str, os.PathLike, Mapping)) or not data:
        raise DataError(
            f"data of type {type(data).__name__}",
            "a dataset's prefix, prefixes with their weights, or an array of token ids",
            "give one of these; a data set of texts is tokenized first",
        )
    weights = {os.fspath(name): float(weight) for name, weight in data.items()} if isinstance(data, Mapping) else {os.fspath(data): 1.0}
    found = {name: open_corpus(name) for name in weights}
    for corpus in found.values():
        if vocab_size is not None:
            check_vocabulary(corpus, vocab_size)
    return dict(found), tuple(weights.items())
