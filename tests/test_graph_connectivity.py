"""Connected components and breadth-first search find what SciPy finds, with the same numbering."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import breadth_first_order, connected_components

from cocktailsdk.graph.connectivity import breadth_first_edges, component_roots
from cocktailsdk.graph.labels import Labels

Edges = tuple[int, np.ndarray, np.ndarray]


@st.composite
def graphs(draw: st.DrawFn) -> Edges:
    """Few nodes and many edges, and the reverse; with loops and repeated edges."""
    n = draw(st.integers(1, 60))
    node = st.integers(0, n - 1)
    pairs = draw(st.lists(st.tuples(node, node), max_size=120))
    left, right = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return n, left, right


def smallest_of_component(n: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    _, component = connected_components(coo_matrix((np.ones(left.size), (left, right)), shape=(n, n)), directed=False)
    _, first = np.unique(component, return_index=True)
    return first[component]


def path(n: int) -> Edges:
    return n, np.arange(n - 1), np.arange(1, n)


def shuffled_path(n: int) -> Edges:
    order = np.random.default_rng(0).permutation(n)
    return n, order[:-1], order[1:]


def star_around_the_last(n: int) -> Edges:
    return n, np.full(n - 1, n - 1), np.arange(n - 1)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(graphs())
def test_components_are_those_of_scipy_named_by_their_smallest_node(graph: Edges) -> None:
    roots = component_roots(*graph)
    assert roots.dtype == np.int64
    np.testing.assert_array_equal(roots, smallest_of_component(*graph))


@pytest.mark.parametrize("make", [path, shuffled_path, star_around_the_last])
def test_long_paths_and_wide_stars_become_one_component(make: Callable[[int], Edges]) -> None:
    assert not component_roots(*make(20_000)).any()


@settings(deadline=None, derandomize=True, max_examples=300)
@given(graphs())
def test_breadth_first_search_finds_the_tree_of_scipy(graph: Edges) -> None:
    n, left, right = graph
    key = np.unique(left * n + right)  # SciPy sorts edges and merges equal ones
    tail, head = key // n, key % n
    edge = breadth_first_edges(n, tail, head, 0)
    matrix = csr_matrix((np.ones(key.size), (tail, head)), shape=(n, n))
    _, before = breadth_first_order(matrix, 0, directed=True)
    found = edge >= 0
    np.testing.assert_array_equal(found, before >= 0)
    np.testing.assert_array_equal(tail[edge[found]], before[found])
    np.testing.assert_array_equal(head[edge[found]], np.flatnonzero(found))


def test_labels_stay_with_the_first_reason_and_the_shortest_way_to_it() -> None:
    labels = Labels()
    a = labels.fresh(6)
    for at, (x, y) in {"far": (1, 2), "near": (2, 3), "beside": (4, 5)}.items():
        labels.at = at
        labels.join(a[x - 1 : x], a[y - 1 : y])
    labels.at = "output"
    labels.stay(a[2:3], "read by the caller")
    labels.stay(a[0:1], "read again")
    root, why = labels.classes()
    assert root.tolist() == [0, 0, 0, 0, 4, 4, 6]
    assert why == dict.fromkeys([1, 2, 3], "read by the caller")
    causes = labels.causes([1, 2, 3], root)
    assert [(c.reason, c.at, c.steps, c.family) for c in causes.values()] == [
        ("read again", "output", (), 1),
        ("read again", "output", (("far", 1),), 1),
        ("read by the caller", "output", (), 1),
    ]
