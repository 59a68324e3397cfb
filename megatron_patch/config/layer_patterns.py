"""Megatron's notation for windows and for patterns of blocks, such as `--window-size` and `--no-rope-freq`.

In: the texts of these options. Out: the length of the window in positions, and the numbers of the blocks that a pattern marks. The same
texts mean the same in Megatron-Core 0.15 (`is_layer_window_attention`, and `no_rope_freq` and `moe_layer_freq` of its TransformerConfig).
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Sequence

from megatron_patch.config.option_types import flag_of
from megatron_patch.config.options import ExpertOptions, ModelOptions
from megatron_patch.config.problems import one_error, problems_of, shown
from megatron_patch.errors import ConfigError
from megatron_patch.model.families import FAMILIES

_LONGEST = 1_000_000_000
_MOST_BLOCKS = 10_000
_LONGEST_TEXT = 50_000


def window_positions(text: str) -> int:
    """Returns the positions that a position attends to at most, from --window-size: LEFT before it, and itself.

    Raises:
        ConfigError: the text is not LEFT,0.
    """
    found = re.fullmatch(r"\(?\s*(\d{1,12})\s*,\s*(-?\d{1,12})\s*\)?", text.strip())
    if found is None or int(found[2]) != 0 or int(found[1]) >= _LONGEST:
        alone = text.strip()
        example = f"{int(alone) - 1},0" if alone.isascii() and alone.isdigit() and 0 < int(alone[:12]) < _LONGEST else "4095,0"
        raise ConfigError(
            f"--window-size {shown(text)}",
            f"LEFT,0 with LEFT from 0 to {_LONGEST - 1:,}: a position attends to LEFT positions before it and to itself",
            f"write {example} for a window of {int(example[:-2]) + 1:,} positions, or leave the flag out for no window",
        )
    return int(found[1]) + 1


def marked_blocks(text: str, num_layers: int, name: str, mark: int) -> tuple[int, ...]:
    """Returns the numbers, from 0, of the blocks that a pattern marks, in ascending order.

    Args:
        text: a number N, which marks every N-th block, or a list with 0 or 1 for each block, such as [1,1,0] or ([1]*2+[0])*4.
        num_layers: blocks of the model.
        name: name of the option, for messages.
        mark: which of 0 and 1 marks a block in a list.

    Raises:
        ConfigError: the text is neither, or the list has another length.
    """
    given = f"{flag_of(name)} {shown(text)}"
    if re.fullmatch(r"\s*\d{1,9}\s*", text) and int(text) >= 1:
        return tuple(range(int(text) - 1, num_layers, int(text)))
    try:
        pattern = _list_of(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(
            given,
            "a whole number N from 1, for every N-th block, or a list of 0 and 1 such as ([1]*3+[0])*8, with one for each block",
            "correct it, or leave the flag out",
        ) from error
    if len(pattern) != num_layers:
        raise ConfigError(f"{given}: a list of {len(pattern)}", f"{num_layers}, one for each of --num-layers", "change the list")
    return tuple(number for number, value in enumerate(pattern) if value == mark)


def _list_of(text: str) -> list[int]:
    """Returns the list of 0 and 1 that an expression gives: lists in brackets or only with commas, `+` of lists, `*` with a number.

    Raises:
        ValueError: it is another expression, or is too long; a SyntaxError or others of Python's parser, too.
    """
    if len(text) > _LONGEST_TEXT:
        raise ValueError("too long")
    return _evaluated(ast.parse(text.strip(), mode="eval").body)


def _evaluated(node: ast.expr) -> list[int]:
    if isinstance(node, ast.List | ast.Tuple):
        items = [item.value if isinstance(item, ast.Constant) else None for item in node.elts]
        if all(type(item) is int and item in (0, 1) for item in items):
            return [int(str(item)) for item in items]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _short([*_evaluated(node.left), *_evaluated(node.right)], 1)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        number, other = (node.left, node.right) if isinstance(node.left, ast.Constant) else (node.right, node.left)
        if isinstance(number, ast.Constant) and type(number.value) is int and number.value >= 0:
            return _short(_evaluated(other), number.value)
    raise ValueError("not a list of 0 and 1")


def _short(items: Sequence[int], times: int) -> list[int]:
    if len(items) * times > _MOST_BLOCKS:
        raise ValueError("too long")
    return [*items] * times


def full_attention_blocks(options: ModelOptions) -> tuple[int, ...]:
    """Returns the blocks without a window, by --window-attn-skip-freq; every N-th one, or those with a 0.

    Raises:
        ConfigError: as for `marked_blocks`.
    """
    text = options.window_attn_skip_freq
    return () if text is None else marked_blocks(text, options.num_layers, "window_attn_skip_freq", 0)


def unrotated_blocks(options: ModelOptions) -> tuple[int, ...]:
    """Returns the blocks whose queries and keys are not rotated, by --no-rope-freq or the model family; every N-th one, or those with a 1.

    Raises:
        ConfigError: as for `marked_blocks`.
    """
    text = options.no_rope_freq
    if text is None:
        family = FAMILIES.get(options.model_family)
        every = None if family is None or options.position_embedding_type == "learned_absolute" else family.no_rope_freq
        return () if every is None else tuple(range(every - 1, options.num_layers, every))
    return () if text.strip() == "0" else marked_blocks(text, options.num_layers, "no_rope_freq", 1)


def dense_blocks(options: ExpertOptions, num_layers: int) -> tuple[int, ...]:
    """Returns the blocks without experts, by --moe-layer-freq: those without a 1, or all but the first of every N.

    Raises:
        ConfigError: as for `marked_blocks`.
    """
    text = options.moe_layer_freq
    if text is None:
        return ()
    if re.fullmatch(r"\s*\d{1,9}\s*", text) and int(text) >= 1:
        return tuple(number for number in range(num_layers) if number % int(text))
    return marked_blocks(text, num_layers, "moe_layer_freq", 0)


def check_layer_patterns(options: ModelOptions) -> None:
    """Checks windows and patterns of blocks.

    Raises:
        ConfigError: texts that are neither, a list of another length, or a pattern without what it is a pattern of; the message has all.
    """

    def window() -> None:
        if options.window_size is not None:
            window_positions(options.window_size)
        elif options.window_attn_skip_freq is not None:
            raise ConfigError(
                f"--window-attn-skip-freq {shown(options.window_attn_skip_freq)} without --window-size",
                "--window-size LEFT,0",
                "give --window-size, or remove --window-attn-skip-freq",
            )

    def rotation() -> None:
        family = FAMILIES.get(options.model_family)
        learned = options.position_embedding_type == "learned_absolute"
        if options.position_embedding_type is None and family is not None:
            learned = family.position_embedding == "learned"
        if options.no_rope_freq is not None and learned:
            raise ConfigError(
                f"--no-rope-freq {shown(options.no_rope_freq)} with learned positions", "rotary positions", "remove --no-rope-freq"
            )

    def frequencies() -> None:
        if options.windowed_rotary_base is not None and options.window_size is None:
            raise ConfigError(
                f"--windowed-rotary-base {options.windowed_rotary_base:g} without --window-size",
                "--window-size LEFT,0",
                "give --window-size, or remove --windowed-rotary-base",
            )

    patterns = (functools.partial(part, options) for part in (full_attention_blocks, unrotated_blocks))
    if problems := problems_of(window, rotation, frequencies, *patterns):
        raise one_error(problems)
