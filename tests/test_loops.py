"""Co-training in loops of people's own: the same as the trainer's, and what may go wrong in them."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from training_tiny import assert_identical, sgd, tiny_images, tiny_net, tiny_trainer, to_float

import cocktailsdk as cocktail
from cocktailsdk import TrainingError
from cocktailsdk.training import StepHook
from cocktailsdk.training.recipes import ScheduleContext, Step, SubnetPass, recipe_named
from cocktailsdk.training.schedules import cosine

PAIRS = [cocktail.Unstructured(sparsities=[0.3, 0.6]), "1:2"]
SAME_BATCH = replace(recipe_named("cocktail"), name="same-batch", same_batch=True)


def batches() -> list[tuple[Tensor, Tensor]]:
    data = tiny_images(32)
    return list(zip(to_float(data.images).split(8), data.labels.split(8), strict=True))


def plain_net(seed: int = 0) -> cocktail.CocktailNet:
    net = tiny_net(seed, PAIRS)
    net.model.dropout.p = 0.0  # whose numbers the trainer draws from its own seeds
    return net.train()


def trained(net: cocktail.CocktailNet) -> dict[str, Any]:
    return {
        "weights": {n: t.detach().clone() for n, t in net.state_dict().items()},
        "masks": {n: dict(m.elements) for n, m in net.masks.items()},
        "statistics": {n: dict(s) for n, s in net.statistics.items()},
        "metrics": dict(net.metrics),
    }


def backward(net: Any, step: Any, x: Tensor, y: Tensor) -> Tensor:
    output = net.model(x)
    loss = step.loss(F.cross_entropy(output, y), output, y)
    loss.backward()
    return loss.detach()


def follow(net: cocktail.CocktailNet, loop: cocktail.CoLoop, loader: Any) -> list[str]:
    """A plain loop whose optimizer and schedule begin anew with every round, as the trainer's do."""
    seen: list[str] = []
    for x, y in loop.batches(loader):
        with loop.step((x, y)) as step:
            if step.begins_round:
                optimizer = sgd(net.model.parameters())
                schedule = cosine()(optimizer, 24 if step.finishing else 8)
            seen.append(step.network)
            optimizer.zero_grad()
            backward(net, step, x, y)
        optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("recipe", ["cocktail", SAME_BATCH], ids=["cocktail", "same-batch"])
def test_a_loop_of_ones_own_gives_the_trainers_weights_bit_for_bit(recipe: Any) -> None:
    data, net, theirs = batches(), plain_net(), plain_net()
    trainer = tiny_trainer(theirs, recipe=recipe, train_loader=data, val_loader=data[:2], seed=5)
    trainer.fit()
    loop = cocktail.CoLoop(net, 48, recipe=recipe, seed=5)
    seen = follow(net, loop, data)
    assert loop.finished and loop.done == trainer.history.steps
    assert seen[:11] == ["dense"] * 9 + ["unstructured@0.3", "dense"] and set(seen) == set(net.names)
    loop.finish(data, data[:2], recalibration_batches=2)
    assert_identical(trained(net), trained(trainer.net))


@pytest.mark.parametrize("stop", [5, 8, 17, 30])
def test_a_loop_goes_on_identically_from_its_state(stop: int) -> None:
    data = batches()
    results = []
    for stops in ([], [stop]):
        net = plain_net()
        loop = cocktail.CoLoop(net, 48)
        for at in range(48):
            if at in stops:  # all anew, from what was saved
                file = io.BytesIO()
                torch.save({"net": net.state_dict(), "loop": loop.state_dict()}, file)
                file.seek(0)
                state = torch.load(file, weights_only=True)
                net = plain_net(seed=1)
                loop = cocktail.CoLoop(net, 48)
                loop.load_state_dict(state["loop"])
                net.load_state_dict(state["net"])
            x, y = data[at % 4]
            optimizer = torch.optim.SGD(net.model.parameters(), lr=0.1)
            optimizer.zero_grad()
            with loop.step((x, y)) as step:
                backward(net, step, x, y)
            optimizer.step()
        results.append(trained(net))
    assert_identical(*results)


def test_a_state_of_another_loop_is_refused() -> None:
    net = plain_net()
    state = cocktail.CoLoop(net, 48).state_dict()
    with pytest.raises(TrainingError, match="steps: 48, now 40"):
        cocktail.CoLoop(net, 40).load_state_dict(state)
    with pytest.raises(TrainingError, match="no state of a CoLoop"):
        cocktail.CoLoop(net, 48).load_state_dict({"format": 9})


def to_sparse(net: cocktail.CocktailNet, **options: Any) -> cocktail.CoLoop:
    """A loop whose next step is a sparse one."""
    loop = cocktail.CoLoop(net, 12, **{"recipe": "cocktail", "start": "pretrained", **options})
    x, y = batches()[0]
    with loop.step((x, y)) as step:
        assert step.network == "dense"
        backward(net, step, x, y)
    net.zero_grad()
    assert loop.network == "unstructured@0.3"
    return loop


def test_a_sparse_step_is_taught_and_its_masked_weights_get_no_gradient() -> None:
    net = plain_net()
    loop = to_sparse(net)
    x, y = batches()[1]
    with torch.no_grad():
        soft = net.model(x).softmax(1)
    dense = {n: p.detach().clone() for n, p in net.model.named_parameters()}
    with loop.step((x, y)) as step:
        output = net.model(x)
        labels = F.cross_entropy(output, y)
        loss = step.loss(labels, output, y)
        torch.testing.assert_close(loss, 0.5 * labels + 0.5 * F.cross_entropy(output, soft))
        masks = net.mask_tensors(step.network)
        assert all((net.model.get_parameter(n)[m == 0] == 0).all() for n, m in masks.items())
        loss.backward()
    for name, mask in masks.items():
        gradient = net.model.get_parameter(name).grad
        assert gradient is not None and gradient.any() and not gradient[mask == 0].any()
    assert all(torch.equal(p, dense[n]) for n, p in net.model.named_parameters())


def test_accumulated_batches_train_one_network_and_are_masked_at_the_last() -> None:
    net = plain_net().eval()  # so that batch norms see no batch
    loop = to_sparse(net, distill_weight=0.0)
    whole = cocktail.CoLoop(other := plain_net().eval(), 12, recipe="cocktail", start="pretrained", distill_weight=0.0)
    whole.load_state_dict(loop.state_dict())
    (a, b), (c, d) = batches()[:2]
    for x, y, last in ((a, b, False), (c, d, True)):
        with loop.step(last=last) as step:
            (0.5 * step.loss(F.cross_entropy(net.model(x), y), None)).backward()
        assert loop.done == 1 + last
    with whole.step() as step:
        output = other.model(torch.cat([a, c]))
        step.loss(F.cross_entropy(output, torch.cat([b, d])), output).backward()
    for name, p in net.model.named_parameters():
        torch.testing.assert_close(p.grad, other.model.get_parameter(name).grad)


def test_the_callers_autocast_does_not_keep_casts_of_other_weights() -> None:
    net = plain_net().eval()
    loop = to_sparse(net)
    x, y = batches()[1]
    with torch.autocast("cpu", torch.bfloat16):
        with loop.step((x, y)) as step:
            output = net.model(x)
            inside = output.detach()
            step.loss(F.cross_entropy(output, y), output, y).backward()
        with torch.no_grad():
            dense = net.model(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with net.using(step.network, statistics=False):
            expected = net.model(x)
        torch.clear_autocast_cache()
        assert torch.equal(dense, net.model(x))
    assert torch.equal(inside, expected) and not torch.equal(inside, dense)


def test_an_error_inside_a_step_restores_the_dense_weights_and_counts_nothing() -> None:
    net = plain_net()
    loop = to_sparse(net)
    dense = {n: p.detach().clone() for n, p in net.model.named_parameters()}
    with pytest.raises(ZeroDivisionError), loop.step(batches()[0]):
        raise ZeroDivisionError
    assert loop.done == 1 and loop.current is None and net.active == "dense"
    assert all(torch.equal(p, dense[n]) for n, p in net.model.named_parameters())


def test_what_is_left_out_of_a_step_is_named() -> None:
    net = plain_net()
    loop = to_sparse(net)
    x, y = batches()[0]
    with pytest.raises(TrainingError, match=r"give it, `loop.step\(batch\)`"), loop.step():
        pass
    with pytest.raises(TrainingError, match=r"did not call step.loss"), loop.step((x, y)):
        F.cross_entropy(net.model(x), y).backward()
    with pytest.raises(TrainingError, match="needs the target"), loop.step((x, y)) as step:
        step.loss(F.cross_entropy(output := net.model(x), y), output)
    net.zero_grad()
    with pytest.raises(TrainingError, match="without gradients"), loop.step((x, y)) as step:
        step.loss(F.cross_entropy(output := net.model(x), y), output, y)
    with pytest.raises(TrainingError, match="no step is open"):
        loop.end()
    loop.begin((x, y))
    with pytest.raises(TrainingError, match="open already"):
        loop.begin((x, y))
    with pytest.raises(TrainingError, match="between steps"):
        loop.state_dict()
    loop._close()
    net.switch("1:2")
    with pytest.raises(TrainingError, match="switch"):
        loop.begin((x, y))
    net.switch("dense")
    with pytest.raises(TrainingError, match="took no step"):
        list(loop.batches(batches()))
    with pytest.raises(TrainingError, match=r"1 of 12 steps are done"):
        loop.finish(batches())


def test_after_the_last_step_there_is_no_other() -> None:
    net = plain_net()
    loop = cocktail.CoLoop(net, 4, recipe="cocktail", start="pretrained")
    follow(net, loop, batches())
    assert loop.finished and not loop.repeats
    with pytest.raises(TrainingError, match="all 4 steps are done"):
        loop.begin(batches()[0])
    assert loop.finish(batches()).metrics == {}
    assert set(net.statistics) == set(net.names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "paper"}, "'paper' merges its rounds: CoTrainer does that"),
        ({"recipe": "paper-no-merging"}, "rewinds the weights"),
        ({"recipe": replace(SAME_BATCH, update="active")}, "keeps masked weights unchanged"),
        ({"recipe": replace(SAME_BATCH, finishing_rate=0.1)}, "changes learning rates"),
        ({"recipe": replace(SAME_BATCH, statistics="separate")}, "keeps statistics"),
        ({"recipe": replace(SAME_BATCH, hooks=(StepHook(),))}, "has hooks, which change masks"),
        ({"recipe": "paprika"}, "paper"),
        ({"steps": 3}, "steps=3 is too small: 3 rounds and finishing"),
        ({"start": "middle"}, "start must be"),
        ({"distill_weight": 2.0}, "distill_weight must lie in"),
    ],
)
def test_what_a_loop_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        cocktail.CoLoop(plain_net(), **{"steps": 48, **options})


def test_the_net_must_come_from_sparsify() -> None:
    with pytest.raises(TrainingError, match="sparsify"):
        cocktail.CoLoop(torch.nn.Linear(2, 2), 10)  # type: ignore[arg-type]


def test_steps_of_several_networks_are_refused_when_they_come() -> None:
    def both(context: ScheduleContext) -> Step:
        return Step((SubnetPass("dense"), SubnetPass(context.names[0])))

    loop = cocktail.CoLoop(plain_net(), 12, recipe=replace(SAME_BATCH, schedule=both), start="pretrained")
    with pytest.raises(TrainingError, match="several networks"):
        loop.begin(batches()[0])
