"""Which dimensions of a tensor's two shapes belong together, before and after a reshape."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["blocks"]


def blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions of both shapes that hold the same number of elements."""
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        old_dims, new_dims = (
            ([i], [j]) if i < len(old) and j < len(new) else (list(range(i, len(old))), list(range(j, len(new))))
        )
        # The side with fewer elements takes its next dimension until both products agree; sizes of 1 at the end of one
        # side join its last block.
        a = b = 1
        for d in old_dims:
            a *= old[d]
        for d in new_dims:
            b *= new[d]
        i, j = i + len(old_dims), j + len(new_dims)
        while a != b:
            if a < b:
                a *= old[i]
                old_dims.append(i)
                i += 1
            else:
                b *= new[j]
                new_dims.append(j)
                j += 1
        blocks.append((old_dims, new_dims))
    return blocks
