"""Models whose forward pass changes them, in as many ways as people write them."""

from __future__ import annotations

import functools
import threading
import weakref
from array import array
from collections import deque

import torch
from torch import nn

X = (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)),)
BESIDE: dict[str, torch.Tensor] = {}
COUNT = 0


class Body(nn.Module):
    """Three linear layers; ``extra`` is what a model does besides."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def extra(self, y):
        return y

    def forward(self, x):
        return self.o(torch.relu(self.extra(self.b(torch.relu(self.a(x))))))


class SavedMap(Body):
    def extra(self, y):
        self.attention = (y @ y.mT).softmax(-1)
        return self.attention @ y


class Anchors(Body):
    shape, anchors = None, torch.empty(0)

    def extra(self, y):
        if self.shape != y.shape[1]:
            self.anchors, self.shape = torch.arange(y.shape[1], device=y.device).to(y.dtype)[:, None], y.shape[1]
        return y + self.anchors


class ClassCache(Body):
    masks = {}  # noqa: RUF012  # shared by all instances, as people do

    def extra(self, y):
        key = (y.shape[1], y.dtype)
        if key not in self.masks:
            self.masks[key] = torch.ones(y.shape[1], y.shape[1], dtype=y.dtype).tril()
        return self.masks[key] @ y


class MaskInDict(Body):
    def __init__(self) -> None:
        super().__init__()
        self.cache, self.calls, self.log, self.last = {}, 0, [], deque(maxlen=2)

    def extra(self, y):
        self.calls += 1
        self.log.append(y.mean())
        self.last.append(y)
        n = y.shape[1]
        if n not in self.cache:
            self.cache[n] = torch.ones(n, n, dtype=y.dtype).tril()
        return self.cache[n] @ y


class BufferOnFirstUse(Body):
    def extra(self, y):
        if "table" not in self._buffers:
            self.register_buffer("table", torch.arange(y.shape[1], dtype=y.dtype)[:, None] / 10)
        return y + self.table


class CountsInTensors(Body):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("hits", torch.zeros(3))
        self.steps, self.norm = torch.zeros(()), nn.BatchNorm1d(5)

    def extra(self, y):
        self.hits[1] += 1
        self.steps.add_(1)
        return self.norm(y)


class FillsLargeTensors(Body):
    """Large tensors in plain attributes, which a trace writes for real."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.more = torch.zeros(20_000), {"values": [torch.ones(20_000)]}

    def extra(self, y):
        self.keys[3] = 1
        self.more["values"][0].mul_(2).add_(1)
        return y


class ConstrainedWeights(Body):
    def extra(self, y):
        self.b.weight.data = torch.renorm(self.b.weight.data, 2, 0, 0.5)
        self.a.bias.data.clamp_(-0.1, 0.1)
        return y


class CachedFunctions(Body):
    @functools.cached_property
    def scale(self):
        return torch.ones(1)

    @functools.lru_cache(maxsize=4)  # noqa: B019  # as people do
    def mask(self, n, dtype):
        return torch.ones(n, n, dtype=dtype).tril()

    def extra(self, y):
        return self.mask(y.shape[1], y.dtype) @ y * self.scale.to(y.dtype)


class Helper:
    __slots__ = ("last", "seen")

    def __init__(self) -> None:
        self.seen = []

    def note(self, y):
        self.last = y
        self.seen.append(tuple(y.shape))


class PlainObject(Body):
    def __init__(self) -> None:
        super().__init__()
        self.helper, self.local = Helper(), threading.local()

    def extra(self, y):
        self.helper.note(y)
        self.local.y = y
        return y


class Globals(Body):
    def extra(self, y):
        global COUNT
        COUNT += 1
        BESIDE["y"] = y
        return y


class ParentKnown(Body):
    def __init__(self) -> None:
        super().__init__()
        self.b.parent = weakref.ref(self)
        self.b.register_forward_hook(lambda module, args, out: setattr(module.parent(), "features", out))

    def extra(self, y):
        return y + self.features * 0.5


class InSlots(Body):
    __slots__ = ("last",)

    def extra(self, y):
        self.last = y
        return y


class NotesOnTensors(Body):
    def extra(self, y):
        self.b.weight.seen = [*getattr(self.b.weight, "seen", ()), y]
        return y


class CountsInBytes(Body):
    def __init__(self) -> None:
        super().__init__()
        self.bits, self.counts = bytearray(2), array("l", [0])

    def extra(self, y):
        self.bits[0] += 1
        self.counts[0] += 1
        self.counts.append(1)
        return y


class Unlocked(Body):
    """Cannot be copied as it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def extra(self, y):
        with self.lock:
            return y


class ChangesModes(Body):
    def extra(self, y):
        torch.rand(3)
        self.b.eval()
        self.o.weight.requires_grad_(False)
        return y


def hook_on_module():
    model = Body()
    model.b.register_forward_hook(lambda module, args, out: setattr(module, "features", out))
    return model


def hook_into_closure():
    model, features, n = Body(), {}, 0

    def keep(module, args, out, every=[]):  # noqa: B006  # a mutable default, as people do
        nonlocal n
        n += 1
        features[n] = out
        every.append(out)

    model.a.register_forward_hook(keep)
    return model


def hook_of_the_model():
    model = Body()
    model.features = []
    model.b.register_forward_hook(lambda module, args, out: model.features.append(out))
    model.a.register_forward_pre_hook(functools.partial(lambda store, module, args: store.append(args), []))
    return model


def forward_on_the_instance():
    model = Body()
    inner = model.forward

    def forward(x):
        model.calls = getattr(model, "calls", 0) + 1
        return inner(x)

    model.forward = forward
    return model


MAKERS = [
    SavedMap,
    Anchors,
    ClassCache,
    MaskInDict,
    BufferOnFirstUse,
    CountsInTensors,
    FillsLargeTensors,
    ConstrainedWeights,
    CachedFunctions,
    PlainObject,
    Globals,
    ParentKnown,
    InSlots,
    NotesOnTensors,
    CountsInBytes,
    Unlocked,
    ChangesModes,
    hook_on_module,
    hook_into_closure,
    hook_of_the_model,
    forward_on_the_instance,
]
