"""Grouped matrix products and attention without heads: where versions of PyTorch differ, the library does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cocktailsdk as cocktail
from cocktailsdk.graph import couple
from cocktailsdk.graph.compare import RefuseEmptyHeads
from cocktailsdk.graph.export import export
from cocktailsdk.graph.grouped_mm import ExportableGroups, grouped_mm


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 8, 16)), nn.Parameter(torch.randn(2, 16, 8))

    def forward(self, x: Tensor) -> Tensor:
        rows, ends = x.flatten(0, 1), torch.tensor([8, 16], dtype=torch.int32)
        inner = F.grouped_mm(rows, self.up, offs=ends).relu()
        return F.grouped_mm(inner, self.down, offs=ends).view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_experts_are_coupled_in_every_dtype_on_every_version(dtype: torch.dtype) -> None:
    model = Experts().to(dtype)
    found = couple(model, (torch.randn(2, 8, 8, dtype=dtype),), prove=False)
    assert [g.size for g in found.groups] == [16]
    assert found.flops() == 2 * 2 * 16 * 8 * 16


def test_the_op_computes_what_pytorch_does() -> None:
    x, w = torch.randn(9, 8), torch.randn(3, 8, 16)
    ends = torch.tensor([4, 4, 9], dtype=torch.int32)  # the second group is empty
    torch.testing.assert_close(grouped_mm(x, w, ends), F.grouped_mm(x, w, offs=ends))
    torch.library.opcheck(grouped_mm, (x, w, ends), test_utils=("test_schema", "test_faketensor"))


def test_only_calls_that_the_op_can_do_are_replaced() -> None:
    stack = torch.randn(2, 4, 8)
    ends = torch.tensor([2, 4], dtype=torch.int32)
    with ExportableGroups():
        batched = F.grouped_mm(stack, torch.randn(2, 8, 16))
        by_column = F.grouped_mm(stack.transpose(1, 2), torch.randn(4, 8), offs=ends * 2)
    assert batched.shape == (2, 4, 16)
    assert by_column.shape[0] == 8


def test_a_model_is_exported_with_its_own_calls() -> None:
    graph = export(nn.Linear(8, 4), (torch.randn(2, 8),)).graph
    assert not [n for n in graph.nodes if "cocktailsdk" in str(n.target)]


class GroupedQueries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.kv, self.width = 4, 2, 4
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        self.o = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.width).transpose(1, 2)
        k, v = (m(x).view(b, n, self.kv, self.width).transpose(1, 2) for m in (self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


def test_attention_without_heads_raises_and_does_not_end_the_process() -> None:
    q, none = torch.randn(1, 4, 6, 8), torch.randn(1, 0, 6, 8)
    with RefuseEmptyHeads():
        for call in (
            lambda: F.scaled_dot_product_attention(q, none, none, enable_gqa=True),
            lambda: F.scaled_dot_product_attention(query=q, key=none, value=none, enable_gqa=True),
        ):
            with pytest.raises(ValueError, match="without heads"):
                call()
        assert F.scaled_dot_product_attention(q, q, q).shape == q.shape
        assert F.scaled_dot_product_attention(q[0], q[0], q[0]).shape == q.shape[1:]


def test_grouped_queries_are_slimmed_to_fewer_heads() -> None:
    x = torch.randn(2, 6, 16)
    small = cocktail.slim(GroupedQueries().eval(), (x,), ratio=0.5, round_to=1)
    assert small(x).shape == x.shape
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in GroupedQueries().parameters())
