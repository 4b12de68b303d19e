"""Orders in which a window is revealed: groups of positions predicted together, and how much of a canvas they need.

Knows nothing of models or tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mezzotint import seeding
from mezzotint.errors import DataError, shown


def reveal_order(order: str, length: int) -> list[np.ndarray]:
    """The positions of a window of `length` tokens in the order they are revealed, as groups revealed together.

    Tokens of a group are predicted at once from the groups before, each by its own conditional, so any order makes an
    exact code: the groups depend on the length alone, never on a token, a probability or the rest of the batch.

    `left`: one by one from left to right. `random(s)`: one by one in the s-th fixed random order. `block(k)`: from
    left to right, k neighbours at once. `spread(n)`: n groups of about equal size whose positions lie far apart
    (bit-reversed), so that what is predicted together depends on one another as little as may be.
    Raises DataError for any other word.
    """
    match = re.fullmatch(r"(left|random|block|spread)(?:\((\d{1,100})\))?", order)
    name, number = (match[1], match[2]) if match else (None, None)
    if name == "left" and number is None:
        return [np.array([i]) for i in range(length)]
    if name == "random" and number is not None:
        shuffled = seeding.numpy_generator(int(number), length).permutation(length)
        return [np.array([i]) for i in shuffled]
    if name == "block" and number is not None and int(number) >= 1:
        return [np.arange(i, min(i + int(number), length)) for i in range(0, length, int(number))]
    if name == "spread" and number is not None and int(number) >= 1:
        bits = max(1, (length - 1).bit_length())
        reversed_bits = [int(format(i, f"0{bits}b")[::-1], 2) for i in range(1 << bits)]
        positions = np.array([i for i in reversed_bits if i < length])
        return [np.sort(group) for group in np.array_split(positions, min(int(number), length))]
    raise DataError(f"unknown order {shown(order)}: use left, random(seed), block(size) or spread(passes)")


def canvas_length(block_size: int, length: int, last: int) -> int:
    """How much of a window of `length` tokens the network must be given to predict positions up to `last`.

    What a position cannot see cannot matter: under `causal` or `block(k)` the canvas ends with the last block.
    """
    size = block_size or length
    return min(length, (last // size + 1) * size)


def merge_blocks(groups: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """The n-th groups of all blocks of `size` positions together, for every n: what can be predicted at once when each
    block is predicted from the true ones before it. Empty for an order that does not finish each block before the next.
    """
    owners = [int(group.min()) // size for group in groups]
    if owners != sorted(owners) or any(int(g.max()) // size != owner for g, owner in zip(groups, owners, strict=True)):
        return []
    together: list[list[np.ndarray]] = []
    for n, (group, owner) in enumerate(zip(groups, owners, strict=True)):
        place = n - owners.index(owner)
        together += [[]] * (place == len(together))
        together[place] = [*together[place], group]
    return [np.concatenate(parts) for parts in together]
