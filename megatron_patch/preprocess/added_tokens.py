"""Which added tokens a fast encoder may find at other places than the reference. In: a Hugging Face tokenizer. Out: their texts.

`tokenizers` looks for added tokens twice: first for those that are not normalized, in the text; then for the others, in the normalized text
between the first ones. `fastokens` looks for all of them at once, and takes the longest one at the first place. The results are the same as
long as no token of one kind can touch one of the other kind in a way that matters: by sharing characters, or, where a token takes the white
space next to it or must be a whole word, by standing next to it. Where a token takes the white space next to it and another one, or itself,
begins or ends with white space, the two libraries differ too, whatever the kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_LONG = 64  # characters of an added token from which it is not compared with others: it counts as one that shares characters


def ambiguous_tokens(tokens: Sequence[Any]) -> list[str]:
    """Returns the texts of the added tokens of which a text may hold none, so that both ways find the same.

    Args:
        tokens: added tokens of the library `tokenizers`.
    """
    kinds: tuple[list[Any], list[Any]] = ([], [])
    for token in tokens:
        if token.content:
            kinds[bool(token.normalized)].append(token)
    first, second = kinds
    every = [*first, *second]
    if first and second and any(token.lstrip or token.rstrip or token.single_word for token in every):
        return sorted({token.content for token in every})
    taking = {token.content for token in every if token.lstrip or token.rstrip}
    spaced = {token.content for token in every if token.content != token.content.strip()}
    beside_spaces = taking | spaced if taking and spaced else set()
    return sorted(beside_spaces | _overlapping([token.content for token in first], [token.content for token in second]))


def _overlapping(first: Sequence[str], second: Sequence[str]) -> set[str]:
    """Returns the texts of two lists that share characters with one of the other list where they meet: one contains the other, or one
    begins as the other ends. Of two that share characters one is enough, because a text in which they meet contains both: a long one is
    returned without being compared.
    """
    if not first or not second:
        return set()
    found = {text for text in (*first, *second) if len(text) > _LONG}
    first, second = ([text for text in some if len(text) <= _LONG] for some in (first, second))
    for some, others in ((first, second), (second, first)):
        begins: dict[str, set[str]] = {}
        for other in others:
            for size in range(1, len(other)):
                begins.setdefault(other[:size], set()).add(other)
        joined = "\0".join(some)
        contained = [other for other in others if other in joined]
        for text in some:
            inside = {other for other in contained if other in text}
            after = {other for start in range(1, len(text)) for other in begins.get(text[start:], ())}
            if inside or after:
                found |= {text, *inside, *after}
    return found
