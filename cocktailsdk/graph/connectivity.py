"""Connected components and breadth-first search on arrays of edges, in NumPy.

``scipy.sparse.csgraph`` has both, but these two functions would be the only use of SciPy (130 MB) in the package.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64

__all__ = ["breadth_first_edges", "component_roots"]


def component_roots(
    n: int, left: Int64[np.ndarray, " edges"], right: Int64[np.ndarray, " edges"]
) -> Int64[np.ndarray, " n"]:
    """For every node of an undirected graph the smallest node of its connected component.

    The algorithm is hooking and pointer jumping (Shiloach and Vishkin, 1982). ``root`` holds a forest in which every
    node points to itself or to a smaller node. A round hooks each tree that has an edge to a tree with a smaller root
    onto the smallest such root. Then pointer jumping makes every node point to its tree's root. Hooks only lead to
    smaller nodes, so no cycle arises, and the last root of a component is its smallest node.

    A root that is not hooked for two rounds has absorbed another root, so two rounds at least halve the number of trees
    with edges between them: there are at most 2 log2(n) rounds.

    Args:
        n: Number of nodes.
        left: One end of each edge.
        right: The other end. Edges may occur several times, and may join a node to itself.
    """
    root = np.arange(n, dtype=np.int64)
    while True:
        left, right = root[left], root[right]  # from here on edges are between roots
        differ = left != right
        if not differ.any():
            return root
        left, right = left[differ], right[differ]
        # Unlike root[…] = …, minimum.at keeps the smallest of several values for one root.
        np.minimum.at(root, np.maximum(left, right), np.minimum(left, right))
        while not np.array_equal(root, further := root[root]):  # doubles the length of each pointer
            root = further


def breadth_first_edges(
    n: int, tail: Int64[np.ndarray, " edges"], head: Int64[np.ndarray, " edges"], start: int
) -> Int64[np.ndarray, " n"]:
    """For every node of a directed graph the edge through which a breadth-first search from a node reaches it first.

    The search takes whole levels at a time, each in the order in which a queue would hold its nodes, so that it finds
    the same tree as a search by node.

    Args:
        n: Number of nodes.
        tail: Where each edge begins, in ascending order.
        head: Where each edge ends. The search tries the edges of a node in the order given here.
        start: Where the search begins.

    Returns:
        Positions in ``tail`` and ``head``; -1 for ``start`` and for nodes that cannot be reached.
    """
    begins = np.searchsorted(tail, np.arange(n + 1))  # node i has the edges begins[i] to begins[i + 1]
    edge = np.full(n, -1, dtype=np.int64)
    level, seen = np.array([start]), np.zeros(n, dtype=bool)
    seen[start] = True
    while level.size:
        first, count = begins[level], begins[level + 1] - begins[level]
        # The edges of the level's nodes, one after the other: ranges from first, of lengths count, without a loop.
        out = np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)
        out = out[~seen[head[out]]]
        # Of several edges to one node the one tried first counts. NumPy leaves the last value at a repeated index, so
        # that the edges are written in reverse; those that are still there are the ones that count.
        edge[head[out][::-1]] = out[::-1]
        level = head[out[edge[head[out]] == out]]
        seen[level] = True
    return edge
