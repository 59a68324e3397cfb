"""The plan of an exchange, played through for many layouts: every element reaches its owner once and every holder once."""

import itertools
import math
import random

import pytest

from megatron_patch.model.parameters import is_hidden_matrix, parameters_of_layers
from megatron_patch.model.shape import ModelShape
from megatron_patch.model.sharding import Shard, shard_of
from megatron_patch.optimizers.ownership import MatrixSpan, orthogonalization_flops, plan_exchange


def llama(layers, hidden_size, heads, groups, inner):
    """The shape of a model with SwiGLU."""
    return ModelShape(layers, hidden_size, heads, groups, hidden_size // heads, inner, 512, 512, 128)


MODEL = llama(32, 4096, 32, 8, 11008)
"""The blocks of a 7B model."""
SMALL = llama(2, 16, 4, 2, 24)


def hidden(shape):
    """Name -> shape of the hidden matrices, in the order of the model."""
    return {name: size for name, size in parameters_of_layers(shape).items() if is_hidden_matrix(name, len(size))}


def spans_of(shape, tensor, data, zero):
    """The spans of each rank of a layout, in the order of DeepSpeed's ranks."""
    result = []
    for _, tensor_rank in itertools.product(range(data), range(tensor)):
        local, end = [], 0
        for name, (rows, columns) in hidden(shape).items():
            shard = shard_of(name, shape, tensor_rank, tensor)
            numel = rows * columns // (1 if shard is None else shard.count)
            local.append((name, (rows, columns), shard, end, numel))
            end += numel
        result.append((local, end))
    ranks = []
    for rank, (local, total) in enumerate(result):
        data_rank, spans = rank // tensor, []
        for name, full, shard, begin, numel in local:
            if zero == 0:
                first, last = begin, begin + numel
            elif zero == 3:  # every parameter is cut into equal parts
                part = -(-numel // data)
                first, last = begin + min(numel, part * data_rank), begin + min(numel, part * (data_rank + 1))
            else:  # the flat group is cut into equal parts
                part = -(-total // data)
                first, last = max(begin, part * data_rank), min(begin + numel, part * (data_rank + 1))
            if last > first:
                spans.append(MatrixSpan(name, full, shard, first - begin, last - first, 0, first))
        ranks.append(spans)
    return ranks


def play(spans, limit):
    """Sends numbers through the plans of all ranks; returns the plans. Every element of the result is the negative of its source."""
    plans = [plan_exchange(spans, rank, limit) for rank in range(len(spans))]
    size = max(span.offset + span.numel for local in spans for span in local)
    full = {}
    for local in spans:
        for span in local:
            full.setdefault(span.name, [random.random() for _ in range(math.prod(span.shape))])
    sources, results = [[None] * size for _ in spans], [[None] * size for _ in spans]
    for local, values in zip(spans, sources, strict=True):
        for span in local:
            values[span.offset : span.offset + span.numel] = shard_values(full[span.name], span)
    assert len({len(plan.waves) for plan in plans}) == 1 and len({tuple(plan.owners.items()) for plan in plans}) == 1
    for waves in zip(*(plan.waves for plan in plans), strict=True):
        assert len({wave.exchanges for wave in waves}) == 1, "a collective that only some ranks call would hang"
        buffers = [[None] * wave.numel for wave in waves]
        for rank, wave in enumerate(waves):
            for held, part in wave.copies:
                put(buffers[rank], part.offset, sources[rank][held.offset : held.offset + held.numel])
            for other, source in enumerate(waves):
                message = [value for cut in source.sends[rank] for value in sources[other][cut.offset : cut.offset + cut.numel]]
                assert wave.exchanges or not message
                for part in wave.receives[other]:
                    put(buffers[rank], part.offset, message[: part.numel])
                    del message[: part.numel]
                assert not message
            for matrix in wave.matrices:
                values = buffers[rank][matrix.offset : matrix.offset + matrix.numel]
                assert values == by_shards(full[matrix.name], matrix.shape, matrix.dim, matrix.shards)
            assert None not in buffers[rank]
            returned = sum(part.numel for parts in wave.returns for part in parts)
            assert max(wave.numel, returned) <= limit or len(wave.matrices) == 1
        for rank, wave in enumerate(waves):
            for held, part in wave.copies:
                put(results[rank], held.offset, buffers[rank][part.offset : part.offset + part.numel])
            for other, source in enumerate(waves):
                message = [value for part in source.returns[rank] for value in buffers[other][part.offset : part.offset + part.numel]]
                for held in wave.arrivals[other]:
                    put(results[rank], held.offset, message[: held.numel])
                    del message[: held.numel]
                assert not message
    assert results == sources
    return plans


def put(values, offset, part):
    """Sets elements that nothing has set before."""
    assert all(value is None for value in values[offset : offset + len(part)])
    values[offset : offset + len(part)] = part


def by_shards(values, shape, dim, count):
    """The elements of a matrix, shard after shard."""
    rows, columns = shape
    if dim == 0:
        return values
    part = columns // count
    return [values[row * columns + shard * part + column] for shard in range(count) for row in range(rows) for column in range(part)]


def shard_values(values, span):
    """The elements of a span."""
    shard = span.shard or Shard(0, 0, 1)
    order = by_shards(values, span.shape, shard.dim, shard.count)
    begin = shard.index * (len(order) // shard.count) + span.start
    return order[begin : begin + span.numel]


@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize(("tensor", "data"), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 3), (4, 2)])
def test_every_element_travels_once(tensor, data, zero):
    for limit in (1, 500, 1 << 26):
        plans = play(spans_of(SMALL, tensor, data, zero), limit)
    assert tensor * data > 1 or not plans[0].waves[0].exchanges


def test_spans_that_overlap_in_parts_are_cut_at_all_edges():
    shape = (4, 6)
    spans = [
        [MatrixSpan("blocks.0.a", shape, None, 0, 10, 0, 3)],
        [MatrixSpan("blocks.0.a", shape, None, 4, 20, 0, 0)],
        [MatrixSpan("blocks.0.a", shape, None, 0, 24, 0, 7)],
        [],
    ]
    (wave,) = play(spans, 100)[2].waves
    assert [part.numel for _, part in wave.copies] == [4, 6, 14] and wave.matrices


def test_loads_are_even_and_nothing_is_sent_where_no_matrix_is_cut():
    plan = plan_exchange(spans_of(MODEL, 1, 8, 1), 0, 1 << 26)
    assert not any(wave.exchanges for wave in plan.waves), "with 8 ranks, each has four whole blocks"
    for tensor, data, zero in ((1, 8, 1), (1, 64, 3), (2, 8, 1), (8, 4, 1), (1, 16, 0)):
        plan = plan_exchange(spans_of(MODEL, tensor, data, zero), 0, 1 << 26)
        total = sum(orthogonalization_flops(size) for size in hidden(MODEL).values())
        assert sum(plan.loads) == pytest.approx(total) and max(plan.loads) < 1.1 * total / len(plan.loads), (tensor, data, zero)


def test_the_cost_of_an_orthogonalization_is_that_of_its_products():
    assert orthogonalization_flops((3, 5), 1) == 2 * 3 * 5 * 3 + 2 * 3 * 3 * 3 + 2 * 3 * 3 * 5
    assert orthogonalization_flops((5, 3), 4) == 4 * orthogonalization_flops((3, 5), 1)
