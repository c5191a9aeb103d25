"""What lets ranks share a global batch equally: numbers of them, and sizes near the recipe's.

global batch = micro-batch x accumulation x world size, in whole numbers.
"""


def fitting_ranks(total: int, micro: int) -> list[int]:
    """All numbers of ranks that share a global batch in such micro-batches."""
    parts = total // micro
    return [n for n in range(1, parts + 1) if parts % n == 0]


def fitting_globals(total: int, micro: int, ranks: int) -> list[int]:
    """The global batches next to this one that so many ranks share: below, if any, and above."""
    step = micro * ranks
    return [n for n in (total // step * step, -(-total // step) * step) if n]


def fitting_micro(total: int, micro: int, ranks: int) -> int | None:
    """The largest micro-batch up to this one with which so many ranks share the global batch."""
    if total % ranks:
        return None
    part = total // ranks
    return max(n for n in range(1, min(micro, part) + 1) if part % n == 0)
