"""Imports a Hugging Face folder, or weights that DeepSpeed's zero_to_fp32.py merged, as a checkpoint from which a new run starts.

In: config.json and weights (safetensors, or PyTorch files that hold only tensors), with Hugging Face's names or with ours. Out:
OUTPUT/step-00000000 and OUTPUT/tokenizer. All names and shapes are checked before the first byte is written; one tensor is in memory at a
time.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_patch.convert.architectures import Architecture, architecture_named, architecture_of, kept_keys, shape_of, special_ids
from megatron_patch.convert.checkpoint_io import UNFINISHED, check_output, groups_by_size, imported_options, write_weights
from megatron_patch.convert.tensor_names import MappedTensor, is_buffer, is_load, mapped_tensors, match_prefix, parameter_shapes
from megatron_patch.convert.tokenizer_files import FILES, main_file, tokenizer_type_of
from megatron_patch.convert.weight_files import Weights, open_weights
from megatron_patch.errors import CheckpointError
from megatron_patch.model.families import family_of_shape
from megatron_patch.model.precision import precision_of
from megatron_patch.model.shape import ModelShape
from megatron_patch.utils.files import read_json, reason

FILE_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ImportResult:
    """What an import wrote.

    Args:
        folder: the checkpoint.
        shape: the model's shape.
        family: the model's family, a name that `--model-family` takes.
        tensors: number of tensors read.
        tokenizer: the tokenizer's folder or file, or None.
        tokenizer_type: its type, a name that `--tokenizer-type` takes, or None.
        tokenizer_problem: why the tokenizer in the source was not taken, or None.
    """

    folder: Path
    shape: ModelShape
    family: str
    tensors: int
    tokenizer: Path | None
    tokenizer_type: str | None = None
    tokenizer_problem: str | None = None


def read_config(path: Path) -> dict[str, Any]:
    """Returns the contents of a config.json.

    Raises:
        CheckpointError: it is missing, or not a JSON object.
    """
    try:
        config = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {reason(error)}",
            "a model's config.json",
            "for weights without a config.json, give --config with that of a model of the same shape, or --like with a checkpoint",
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} contains a JSON {type(config).__name__}", "a JSON object", "use the model's original config.json")
    return config


def from_hugging_face(
    source: Path,
    output: Path,
    config: Path | None = None,
    shape: ModelShape | None = None,
    divisible_by: int = 128,
    family: str | None = None,
) -> ImportResult:
    """Imports a model.

    Args:
        source: a folder, or one file of weights.
        output: a new or empty folder.
        config: the config.json; None: the one in `source`.
        shape: the model's shape; None: that of the configuration.
        divisible_by: the embedding's rows are padded to a multiple of this.
        family: with `shape`, the model's family; None: the one with the shape's kinds of layers.

    Raises:
        CheckpointError: an unknown architecture; a tensor that is missing, unexpected, truncated or of another shape; a tokenizer with more
            ids than the model; an output folder that is not empty.
        ConfigError: no architecture computes `shape`.
    """
    ids: Mapping[str, Any] | None = None
    kept: Mapping[str, Any] = {}
    architecture: Architecture | None = None
    if shape is None:
        config = config or source / "config.json"
        values = read_config(config)
        architecture = architecture_named(values, str(config))
        family = architecture.family
        shape = shape_of(values, str(config), divisible_by)
        ids, kept = special_ids(values, shape.vocab_size), kept_keys(values, shape.vocab_size)
    family = family or family_of_shape(shape)
    check_output(output, UNFINISHED)
    weights = open_weights(source)
    if any(_own_name(name) == "embedding.word.weight" for name in weights.infos):
        plan = _own_plan(weights, shape)
    else:
        plan = _plan(weights, shape, architecture or architecture_of(shape, family))
    kind, problem = tokenizer_type_of(source, shape.vocab_size)
    return replace(_write(source, output, shape, family, weights, plan, kind, ids or None, kept), tokenizer_problem=problem)


def _own_name(name: str) -> str:
    return name.removeprefix("module.").removeprefix("module.").removeprefix("_orig_mod.")


def _own_plan(weights: Weights, shape: ModelShape) -> list[tuple[str, MappedTensor]]:
    """(name in the files, tensor) for weights with our own names, with or without padding rows of the vocabulary and loads of experts."""
    mapped = []
    names = {name: _own_name(name) for name in weights.infos}
    for name, size in parameter_shapes(shape).items():
        if is_load(name) and name not in names.values():
            continue
        rows = shape.vocab_size if name in ("embedding.word.weight", "head.weight") else size[0]
        mapped.append(MappedTensor(name, (rows, *size[1:]), ((name, size),), rows))
    padded = {t.name: t.parameters[0][1] for t in mapped}
    stored = [
        MappedTensor(t.name, padded[t.name], t.parameters, padded[t.name][0])
        if any(names[name] == t.name and info.shape == padded[t.name] for name, info in weights.infos.items())
        else t
        for t in mapped
    ]
    return _checked(weights, stored, names)


def _plan(weights: Weights, shape: ModelShape, architecture: Architecture) -> list[tuple[str, MappedTensor]]:
    mapped, names = _matched(weights, shape, architecture)
    if shape.tie_embeddings:
        _check_tied(weights, names, mapped[0].name)
        names = {name: full for name, full in names.items() if full != "lm_head.weight"}
    plan = _checked(weights, mapped, names)
    for name, tensor in plan:
        if not tensor.parameters and bool(weights.read(name).any()):
            raise CheckpointError(
                f"{weights.where}: tensor {tensor.name} is not zero, but the shape has no bias of experts",
                "a shape with the bias of experts",
                "give --config with the model's config.json, or --like with a checkpoint of a run with --moe-router-enable-expert-bias",
            )
    return plan


def _matched(weights: Weights, shape: ModelShape, architecture: Architecture) -> tuple[list[MappedTensor], dict[str, str]]:
    """Returns the tensors by the architecture's names, or by other names that the files have instead, and name in the files -> name."""
    mapped = mapped_tensors(shape, architecture.tensors, architecture.biased)
    names = match_prefix(weights.infos, mapped)
    usual = {tensor.name for tensor in mapped}
    for others in architecture.also_reads:
        other = mapped_tensors(shape, others, architecture.biased)
        other_names = match_prefix(weights.infos, other)
        if not {tensor.name for tensor in other}.difference(usual).isdisjoint(other_names.values()):
            return other, other_names
    return mapped, names


def _check_tied(weights: Weights, names: Mapping[str, str], embedding: str) -> None:
    """Checks that a second copy of a tied head equals the embedding."""
    found = {full: name for name, full in names.items()}
    head, word = found.get("lm_head.weight"), found.get(embedding)
    if head is None or word is None:
        return
    if not torch.equal(weights.read(head), weights.read(word)):
        raise CheckpointError(
            f"{weights.where}: tensor lm_head.weight differs from {embedding}, but config.json ties them",
            "equal tensors, or tie_word_embeddings: false",
            "correct tie_word_embeddings in config.json",
        )


def _checked(weights: Weights, mapped: list[MappedTensor], names: Mapping[str, str]) -> list[tuple[str, MappedTensor]]:
    """(name in the files, tensor) for every tensor of the model, after checking that all exist with the right shape, and no others do."""
    found: dict[str, str] = {}
    expected = {tensor.name: tensor for tensor in mapped}
    for name, full in names.items():
        if full not in expected:
            if is_buffer(name):
                continue
            raise CheckpointError(
                f"{weights.where}: unexpected tensor {name} {weights.infos[name].shape}",
                "the tensors of the architecture that config.json names",
                "use the config.json that belongs to these weights",
            )
        if full in found:
            raise CheckpointError(f"{weights.where}: {name} and {found[full]} are both {full}", "each tensor once", "remove one of them")
        found[full] = name
    for tensor in mapped:
        if tensor.name not in found:
            raise CheckpointError(
                f"{weights.where}: tensor {tensor.name} {tensor.shape} is missing", "all tensors of the model", "copy the folder again"
            )
        shape = weights.infos[found[tensor.name]].shape
        if shape != tensor.shape:
            raise CheckpointError(
                f"{weights.where}: tensor {tensor.name} has shape {shape}",
                f"{tensor.shape}, by the configuration",
                "use the configuration that belongs to these weights",
            )
    return [(found[tensor.name], tensor) for tensor in mapped]


def _write(
    source: Path,
    output: Path,
    shape: ModelShape,
    family: str,
    weights: Weights,
    plan: list[tuple[str, MappedTensor]],
    kind: str | None,
    special_ids: Mapping[str, Any] | None,
    kept_config: Mapping[str, Any],
) -> ImportResult:
    units = _units(plan, shape)
    sizes = [sum(int(torch.Size(size).numel()) for _, size in unit.parameters) * 4 for unit in units]
    parts = [[name for number in group for name, _ in units[number].parameters] for group in groups_by_size(sizes, FILE_BYTES)]
    tokenizer = _copy_tokenizer(source, output) / main_file(kind) if kind else None
    data_metadata = {"tokenizer_type": kind, "tokenizer_model": str(tokenizer.resolve())} if tokenizer else None
    folder = write_weights(
        output,
        shape,
        parts,
        _parameters(weights, units),
        precision_of(weights.dtype),
        imported_options(shape, family),
        imported_from=str(source),
        data_metadata=data_metadata,
        special_ids=special_ids,
        kept_config=kept_config,
    )
    return ImportResult(folder, shape, family, len(plan), tokenizer, kind)


@dataclass(frozen=True)
class _Unit:
    """Parameters that are read together.

    Args:
        parameters: (name, shape) of the parameters.
        tensors: (name in the files, tensor) of the tensors that they are made of: one of all parameters, or one of each expert; none: the
            parameters are loads of experts, which are equal at the start.
    """

    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    tensors: tuple[tuple[str, MappedTensor], ...]


def _units(plan: list[tuple[str, MappedTensor]], shape: ModelShape) -> list[_Unit]:
    groups = itertools.groupby(plan, lambda entry: entry[1].parameters)
    found = [_Unit(parameters, tuple(tensors)) for parameters, tensors in groups if parameters]
    planned = {name for unit in found for name, _ in unit.parameters}
    loads = tuple((name, size) for name, size in parameter_shapes(shape).items() if is_load(name) and name not in planned)
    return [*found, _Unit(loads, ())] if loads else found


def _parameters(weights: Weights, units: list[_Unit]) -> Iterator[tuple[str, torch.Tensor]]:
    for unit in units:
        if not unit.tensors:
            yield from ((name, torch.full(size, 1.0 / size[0])) for name, size in unit.parameters)
        elif unit.tensors[0][1].expert is None:
            ((name, tensor),) = unit.tensors
            yield from tensor.split(weights.read(name))
        else:
            ((parameter, size),) = unit.parameters
            stacked = torch.empty(size)
            for name, tensor in unit.tensors:
                stacked[tensor.expert] = weights.read(name)
            yield parameter, stacked


def _copy_tokenizer(source: Path, output: Path) -> Path:
    """Copies the source's tokenizer files to OUTPUT/tokenizer and returns that folder."""
    target = output / "tokenizer"
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target}: {error.strerror}", "a writable folder with free space", "free space, or choose another --output"
        ) from error
    return target
