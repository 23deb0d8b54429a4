"""Sparse steps: the dense network teaches, and leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training_tiny import TinyNet, tiny_images, tiny_net, to_float

from cocktailsdk.training.recipes import Step, SubnetPass
from cocktailsdk.training.step.distill import Classes, Distillation, find_classes, soft_cross_entropy, untouched_buffers
from cocktailsdk.training.step.engine import Stepper
from cocktailsdk.training.step.execution import Execution
from cocktailsdk.utils.nested import default_forward


def batch() -> tuple[Tensor, Tensor]:
    data = tiny_images(16)
    return to_float(data.images), data.labels


def stepper(net: Any, loss_fn: Any = F.cross_entropy, **distillation: Any) -> Stepper:
    taught = Distillation(**{"weight": 0.5, "classes": Classes(1), **distillation})
    return Stepper(net, Execution(net.model, default_forward), loss_fn, taught)


def step_of(name: str) -> Step:
    return Step((SubnetPass(name),))


def no_dropout(net: Any) -> Any:
    net.model.dropout.p = 0.0
    net.train()
    return net


def masked_copy(net: Any, name: str) -> TinyNet:
    model = copy.deepcopy(net.model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, mask in net.mask_tensors(name).items():
            parameters[key].mul_(mask)
    return model


@pytest.mark.parametrize("name", ["unstructured@0.5", "1:2", "channel@0.4"])
def test_a_sparse_step_is_the_papers_loss_on_the_kept_weights(name: str) -> None:
    net = no_dropout(tiny_net())
    x, y = batch()
    student, teacher = masked_copy(net, name), copy.deepcopy(net.model)
    logits = student(x)
    soft = teacher(x).softmax(1).detach()
    expected = 0.5 * F.cross_entropy(logits, y) + 0.5 * F.cross_entropy(logits, soft)
    expected.backward()

    before = {n: p.detach().clone() for n, p in net.model.named_parameters()}
    optimizer = torch.optim.SGD(net.model.parameters(), lr=1.0)
    loss = stepper(net).step(step_of(name), [(x, y)], optimizer).losses[name]

    torch.testing.assert_close(loss, expected.detach())
    masks = net.mask_tensors(name)
    for key, parameter in net.model.named_parameters():
        gradient = student.get_parameter(key).grad * masks.get(key, torch.ones(()))
        torch.testing.assert_close(before[key] - parameter.detach(), gradient, rtol=1e-4, atol=1e-6)


def test_gradients_reach_only_kept_weights_but_decay_moves_all() -> None:
    net = no_dropout(tiny_net())
    before = net.model.conv2.weight.detach().clone()
    optimizer = torch.optim.SGD(net.model.parameters(), lr=0.1, weight_decay=0.01)
    stepper(net).step(step_of("unstructured@0.7"), [batch()], optimizer)
    gone = ~net.masks["unstructured@0.7"].elements["conv2.weight"]
    after = net.model.conv2.weight.detach()
    torch.testing.assert_close(after[gone], before[gone] * (1 - 0.1 * 0.01))
    assert not torch.equal(after[~gone], (before * (1 - 0.1 * 0.01))[~gone])


def test_the_teacher_leaves_no_trace_in_weights_gradients_or_statistics() -> None:
    plain, taught = no_dropout(tiny_net()), no_dropout(tiny_net())
    for net, options in ((plain, {"weight": 0.0}), (taught, {"fn": lambda s, t: 0 * s.sum()})):
        # the same loss with and without a teacher's pass: (1-w) * L doubled, to undo the weight
        double = "fn" in options
        loss_fn = (lambda o, y: 2 * F.cross_entropy(o, y)) if double else F.cross_entropy
        optimizer = torch.optim.SGD(net.model.parameters(), lr=0.1, momentum=0.9)
        stepper(net, loss_fn=loss_fn, **options).step(step_of("channel@0.4"), [batch()], optimizer)
    for (name, a), (_, b) in zip(plain.model.named_parameters(), taught.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad), name
    for (name, a), (_, b) in zip(plain.model.named_buffers(), taught.model.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert taught.active == "dense"


def test_statistics_of_sparse_steps_are_shared() -> None:
    net = no_dropout(tiny_net())
    reference = masked_copy(net, "unstructured@0.5")
    reference(batch()[0])
    stepper(net).step(step_of("unstructured@0.5"), [batch()], torch.optim.SGD(net.model.parameters(), lr=0.1))
    for name, buffer in net.model.named_buffers():
        torch.testing.assert_close(buffer, reference.get_buffer(name))


def test_untouched_buffers_also_puts_replaced_ones_back() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return self.norm(x)

    model = Counting()
    held = model.calls
    before = copy.deepcopy(model.state_dict())
    with untouched_buffers(model):
        model(torch.randn(8, 3))
        assert model.norm.num_batches_tracked == 1
    assert model.calls is held
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_classification_is_found_by_shape() -> None:
    logits, labels = torch.randn(6, 4), torch.arange(6) % 4
    loss = F.cross_entropy(logits, labels)
    assert find_classes(logits, labels, loss) == Classes(1)
    assert find_classes({"logits": logits}, labels, loss) == Classes(1)
    pixels = torch.randn(2, 4, 5, 3), torch.randint(0, 4, (2, 5, 3))
    assert find_classes(*pixels, F.cross_entropy(*pixels)) == Classes(1)


@pytest.mark.parametrize("scale", [1.0, 1e-2])  # trained, and hardly better than chance
def test_language_models_are_told_apart_by_what_their_loss_computes(scale: float) -> None:
    logits, labels = scale * torch.randn(2, 6, 9), torch.randint(0, 9, (2, 6))
    labels[0, 3] = -100
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert find_classes(logits, labels, plain) == Classes(-1)
    assert find_classes(logits, labels, shifted) == Classes(-1, shift=True)
    assert find_classes(logits, labels, torch.tensor(123.0)) is None


@pytest.mark.parametrize(
    ("output", "target"),
    [
        (torch.randn(4, 1), torch.randn(4, 1)),  # regression
        (torch.randn(4, 3), torch.randn(4, 3)),
        (torch.randn(4, 3), torch.zeros(4, 3, dtype=torch.bool)),  # several labels at once
        (torch.randn(4, 3), torch.tensor([0, 1, 2, 7])),  # a label beyond the classes
        ([torch.randn(2)], {"boxes": torch.zeros(2, 4)}),
        (object(), None),
    ],
)
def test_what_is_no_classification_is_not_taken_for_one(output: Any, target: Any) -> None:
    assert find_classes(output, target, torch.tensor(1.0)) is None


def test_soft_cross_entropy_counts_no_ignored_positions() -> None:
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, :3] = -100
    each = -(teacher.softmax(-1) * student.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(soft_cross_entropy(student, teacher, labels, Classes(-1)), each[labels >= 0].mean())
    shifted = each[:, :-1][labels[:, 1:] >= 0].mean()
    torch.testing.assert_close(soft_cross_entropy(student, teacher, labels, Classes(-1, shift=True)), shifted)
