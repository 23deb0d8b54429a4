"""What each recipe trains, with which masks, and what a run keeps of it."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from training_tiny import assert_identical, result, tiny_loaders, tiny_net, tiny_trainer

import cocktailsdk as cocktail
from cocktailsdk import TrainingError
from cocktailsdk.training import events as ev
from cocktailsdk.training.recipes import Recipe, ScheduleContext, Step, SubnetPass, recipe_named, recipes
from cocktailsdk.training.recipes.recipe import NEW
from cocktailsdk.training.recipes.steps import Pivot, Sandwich, Single, rotation
from cocktailsdk.training.rivals.alternating import Alternating, correct_gradients
from cocktailsdk.training.rivals.phases import Phases
from cocktailsdk.training.step.forward import resized

PATTERNS: dict[str, Any] = {
    "imp": (cocktail.Unstructured(sparsities=[0.3, 0.5, 0.7]),),
    "ast": (cocktail.Unstructured(sparsities=[0.3, 0.5, 0.7]),),
    "ac/dc": (cocktail.Unstructured(sparsities=[0.6]),),
}
"""What recipes that are not for any net train."""


def trainer_of(recipe: str | Recipe, **options: Any) -> cocktail.CoTrainer:
    name = recipe if isinstance(recipe, str) else recipe.name
    if name == "pretrained":
        options = {"start": "pretrained", "rewind_epoch": None, **options}
    return tiny_trainer(tiny_net(patterns=PATTERNS.get(name)), recipe=recipe, **options)


def trained(recipe: str | Recipe, **options: Any) -> cocktail.CoTrainer:
    trainer = trainer_of(recipe, **options)
    trainer.fit()
    return trainer


# ------------------------------------------------------------ step schedules


def names(schedule: Any, networks: dict[str, tuple[str, ...]], steps: int, first: int = 0, by: int = 1) -> list[Any]:
    out = []
    for i in range(first, steps, by):
        passes = schedule(ScheduleContext(1, i, steps, networks)).passes
        out.append(passes[0].subnet if len(passes) == 1 else [one.subnet for one in passes])
    return out


def test_mini_batches_alternate_between_the_pivot_and_each_pattern() -> None:
    networks = {"u": ("u1",), "n": ("n1",), "c": ("c1",)}
    assert names(Pivot(), networks, 8) == ["dense", "u1", "dense", "n1", "dense", "c1", "dense", "u1"]


def test_a_pattern_with_several_subnets_takes_them_in_turn() -> None:
    networks: dict[str, tuple[str, ...]] = {"p": ("a", "b"), "q": (), "r": ("c",)}
    assert names(Pivot(), networks, 16, 1, 2) == ["a", "c", "b", "c", "a", "c", "b", "c"]
    assert names(rotation, networks, 5) == ["dense", "a", "b", "c", "dense"]
    assert names(Single(), networks, 4) == ["a", "b", "c", "a"]
    assert names(Single("r"), networks, 2) == ["c", "c"]


def test_after_a_dense_step_several_sparse_ones_may_follow() -> None:
    networks = {"unstructured": ("u1", "u2"), "n:m": (), "channel": ("c1",)}
    assert names(Pivot(sparse=3), networks, 9) == ["dense", "u1", "c1", "u2", "dense", "c1", "u1", "c1", "dense"]
    steps = [Pivot(sparse=2)(ScheduleContext(1, i, 9, networks)) for i in range(3)]
    assert [(s.leads, s.follows) for s in steps] == [(True, False), (True, True), (False, True)]


def test_a_sandwich_has_the_widest_the_narrowest_and_others_at_random() -> None:
    networks = {"c": tuple("abcdef"), "u": tuple("xyz")}
    steps = names(Sandwich(), networks, 40)
    assert all(step[:3] == ["dense", "f", "z"] and len(set(step)) == 5 for step in steps)
    assert {name for step in steps for name in step[3:]} == set("abcdexy")
    assert steps == names(Sandwich(), networks, 40)


# ------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_gives_every_network_statistics_and_a_metric(name: str) -> None:
    trainer = trained(name)
    net = trainer.net
    assert list(net.metrics) == net.names
    assert set(net.statistics) == set(net.names)
    assert trainer.evaluate(tiny_loaders()[1]) == pytest.approx(net.metrics)
    assert trainer.history.steps == trainer.plan().steps
    assert trainer.history.passes >= trainer.history.steps


def test_the_default_finishes_on_all_networks_within_the_budget() -> None:
    net, started = tiny_net(), list[ev.RoundStarted]()
    trainer = tiny_trainer(
        net, recipe="cocktail", epochs=None, total_steps=100, callbacks=[lambda e: started.append(e)]
    )
    trainer.fit()
    rounds = [e for e in started if isinstance(e, ev.RoundStarted)]
    assert [e.epochs for e in rounds] == [3, 3, 2, 2, 9]  # 13, 13, 12, 12 and 50 steps, 6 in an epoch
    assert set(rounds[-1].networks) == set(net.names) - {"dense"}
    assert trainer.history.steps == 100
    assert set(trainer.history.rounds[-1].losses[-1]) <= set(net.names)
    with pytest.raises(
        TrainingError, match=r"total_steps=4 .*give total_steps=5 or more, or rounds=RoundSettings\(count=2\) or fewer"
    ):
        tiny_trainer(recipe="cocktail", epochs=None, total_steps=4)


def test_finishing_can_be_had_at_another_rate() -> None:
    recipe = dataclasses.replace(recipe_named("paper-finishing"), finishing_rate=0.1)
    trainer = trained(recipe, schedule=lambda o, s: torch.optim.lr_scheduler.ConstantLR(o, 1.0))
    rates = [r.learning_rates[-1] for r in trainer.history.rounds]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.01])


def test_on_the_same_batch_a_sparse_step_sees_what_the_dense_one_saw() -> None:
    def seen(recipe: Recipe, distill_weight: float = 0.5) -> list[tuple[bool, int]]:
        calls: list[tuple[bool, int]] = []

        def forward(model: Any, batch: Any) -> Any:
            calls.append((torch.is_grad_enabled(), hash(batch[0].numpy().tobytes())))
            return model(batch[0]), batch[1]

        trainer = tiny_trainer(
            recipe=recipe, forward_fn=forward, epochs=1, rounds=3, merge=False, distill_weight=distill_weight
        )
        trainer.fit()
        return [call for call in calls if call[0]]

    same = dataclasses.replace(recipe_named("paper"), same_batch=True)
    for weight in (0.5, 0):
        batches = [b for _, b in seen(same, weight)][6:]  # round 0 is dense
        assert len(batches) == 18
        assert batches[::2] == batches[1::2]
        assert len(set(batches)) == 9
    assert len({b for _, b in seen(recipe_named("paper"))}) == 24


def test_a_kept_teacher_costs_no_pass_and_gives_the_same_as_a_fresh_one_without_training_between() -> None:
    """With a learning rate of 0 the dense network says the same before and after its step."""
    losses = []
    for same_batch in (True, False):
        recipe = dataclasses.replace(recipe_named("paper"), same_batch=same_batch)
        net = tiny_net()
        net.model.dropout.p = 0.0
        one = [next(iter(tiny_loaders()[1]))] * 4
        options: dict[str, Any] = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.0), "train_loader": one}
        trainer = tiny_trainer(net, recipe=recipe, rounds=3, **options)
        trainer.fit()
        losses.append([r.losses for r in trainer.history.rounds])
    for a, b in zip(*losses, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x == pytest.approx(y, rel=1e-5)


def test_without_rewinding_a_round_begins_where_the_one_before_ended() -> None:
    weights: dict[tuple[str, int], torch.Tensor] = {}

    def keep(event: ev.Event) -> None:
        if isinstance(event, ev.RoundStarted | ev.RoundEnded):
            weights[type(event).__name__, event.round] = trainer.net.model.conv2.weight.detach().clone()

    for name, same in (("paper-no-rewinding", True), ("paper", False)):
        trainer = trainer_of(name, callbacks=[keep])
        trainer.fit()
        for k in (1, 2, 3):
            assert torch.equal(weights["RoundStarted", k], weights["RoundEnded", k - 1]) is same


def test_without_umg_channels_are_ranked_by_all_their_weights() -> None:
    made: dict[str, cocktail.Mask] = {}
    by_all: dict[str, cocktail.Mask] = {}

    def keep(event: ev.Event) -> None:
        if isinstance(event, ev.RoundEnded) and event.round == 0:
            by_all.update({"channel@0.2": trainer.net.make_masks("channel@0.2")})
        if isinstance(event, ev.RoundStarted) and event.round == 1:
            made.update(trainer.net.masks)

    trainer = trainer_of("paper-no-umg", callbacks=[keep])
    trainer.fit()
    assert torch.equal(made["channel@0.2"].removed, by_all["channel@0.2"].removed)


def test_rotation_trains_one_network_after_the_other() -> None:
    seen: list[ev.StepDone] = []
    trained("paper-rotation", callbacks=[lambda e: seen.append(e) if isinstance(e, ev.StepDone) else None])
    second = [e.network for e in seen if e.round == 2]
    assert second[:5] == ["dense", "unstructured@0.5", "1:2", "channel@0.4", "dense"]


def test_without_distillation_any_loss_trains() -> None:
    def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(output, F.one_hot(target, 4).float() - 0.25)

    net = trained("paper-no-distillation", loss_fn=loss_fn).net
    assert list(net.metrics) == net.names


def test_us_net_trains_in_one_round_with_added_gradients() -> None:
    trainer = trained("us-net")
    history = trainer.history
    assert [r.round for r in history.rounds] == [1]
    assert history.steps == 12
    assert history.passes == 12 * (1 + 3 + 2)
    assert history.alphas == []
    with pytest.raises(TrainingError, match="trains all networks in one round, got rounds=3"):
        trainer_of("us-net", rounds=3)


def test_tickets_keep_the_weights_of_their_rounds() -> None:
    ends: dict[int, dict[str, torch.Tensor]] = {}

    def keep(event: ev.Event) -> None:
        if isinstance(event, ev.RoundEnded):
            ends[event.round] = {n: p.detach().clone() for n, p in trainer.net.model.named_parameters()}

    trainer = trainer_of("imp", callbacks=[keep])
    trainer.fit()
    net = trainer.net
    for k, name in enumerate(net.names):
        masks = net.mask_tensors(name)
        with trainer.using(name):
            for key, parameter in net.model.named_parameters():
                expected = ends[k][key] * masks[key] if key in masks else ends[k][key]
                assert torch.equal(parameter.detach(), expected)
    assert set(trainer.history.rounds[2].losses[0]) == {"unstructured@0.5"}
    size = sum(p.numel() for p in net.model.parameters())
    assert trainer.parameters_stored == sum(r.params for r in net.subnets())
    assert size < trainer.parameters_stored < 4 * size
    assert trained("paper").parameters_stored == size
    with pytest.raises(
        TrainingError, match=r"'imp' trains one pattern a run, and this net has unstructured, n:m, channel"
    ):
        tiny_trainer(recipe="imp")


def test_n_m_tickets_are_cut_from_the_dense_rounds_weights() -> None:
    net = tiny_net(patterns=("1:2", "2:4"))
    ended: dict[int, cocktail.Mask] = {}

    def keep(event: ev.Event) -> None:
        if isinstance(event, ev.RoundEnded) and event.round == 0:
            ended[0] = net.make_masks("2:4")

    tiny_trainer(net, recipe="imp", callbacks=[keep]).fit()
    for name, mask in net.masks["2:4"].elements.items():
        assert torch.equal(mask, ended[0].elements[name])


class Recorded:
    """A step's context that notes what a hook does to it."""

    def __init__(self, context: ScheduleContext, step: Step) -> None:
        self.schedule, self.step, self.subnets = context, step, step.subnets
        self.done: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.done.append(name)


def phases_of(schedule: Phases, steps: int) -> list[Recorded]:
    out = []
    for i in range(steps):
        context = ScheduleContext(1, i, steps, {"u": ("a",)})
        recorded = Recorded(context, schedule(context))
        schedule.before_step(recorded)  # type: ignore[arg-type]
        out.append(recorded)
    return out


def test_phases_alternate_and_the_dense_network_keeps_what_the_last_dense_phase_ended_with() -> None:
    steps = phases_of(Phases(), 100)
    sparse = [i for i, s in enumerate(steps) if s.step.passes[0].subnet == "a"]
    expected = {*range(85, 100)}.union(*(range(i, i + 5) for i in range(10, 75, 10)))
    assert set(sparse) == expected
    assert [i for i, s in enumerate(steps) if "remake_masks" in s.done] == [10, 20, 30, 40, 50, 60, 70, 85]
    assert [i for i, s in enumerate(steps) if "drop_optimizer_state" in s.done] == [15, 25, 35, 45, 55, 65, 75]
    assert [i for i, s in enumerate(steps) if "snapshot_weights" in s.done] == [85]
    assert steps[85].done == ["snapshot_weights", "remake_masks", "zero_masked_weights"]
    for n in range(1, 12):
        short = phases_of(Phases(), n)
        assert short[-1].step.passes[0].subnet == "a"
        assert sum("snapshot_weights" in s.done for s in short) == 1


def test_in_a_sparse_phase_masked_weights_are_zero_and_the_mask_is_fixed() -> None:
    seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def keep(event: ev.Event) -> None:
        if isinstance(event, ev.StepDone):
            mask = trainer.net.mask_tensors("unstructured@0.6")["conv2.weight"].clone()
            seen.append((event.network, trainer.net.model.conv2.weight.detach().clone(), mask))

    recipe = dataclasses.replace(recipe_named("ac/dc"), schedule=Phases((0.25, 0.5, 0.75)))
    trainer = trainer_of(recipe, epochs=4, callbacks=[keep])
    trainer.fit()
    assert [n for n, _, _ in seen] == ["dense"] * 6 + ["unstructured@0.6"] * 6 + ["dense"] * 6 + [
        "unstructured@0.6"
    ] * 6
    for name, weight, mask in seen:
        assert bool((weight[mask == 0] == 0).all()) is (name != "dense")
    assert all(torch.equal(m, seen[6][2]) for _, _, m in seen[6:12])
    with trainer.using("dense"):
        assert torch.equal(trainer.net.model.conv2.weight.detach(), seen[17][1])
    with trainer.using("unstructured@0.6"):
        assert torch.equal(trainer.net.model.conv2.weight.detach(), seen[23][1])
    with pytest.raises(
        TrainingError, match=r"'ac/dc' trains one sparse network a run, and this net has 7 .*a single lev"
    ):
        tiny_trainer(recipe="ac/dc")


@pytest.mark.parametrize("pattern", ["unstructured", "n:m"])
def test_alternating_exchanges_weights_layer_by_layer_and_keeps_their_numbers(pattern: str) -> None:
    masks: dict[str, dict[str, cocktail.Mask]] = {}

    def keep(event: ev.Event) -> None:
        if isinstance(event, ev.RoundStarted | ev.RoundEnded):
            masks[type(event).__name__] = dict(net.masks)

    patterns = ("1:2", "2:4") if pattern == "n:m" else (cocktail.Unstructured(sparsities=[0.3, 0.6]),)
    net = tiny_net(patterns=patterns)
    recipe = dataclasses.replace(recipe_named("ast"), schedule=Alternating(period=1))
    tiny_trainer(net, recipe=recipe, callbacks=[keep]).fit()
    for name in net.names[1:]:
        before, after = (masks[kind][name].elements for kind in ("RoundStarted", "RoundEnded"))
        assert any(not torch.equal(before[n], after[n]) for n in before)
        for n, mask in before.items():
            assert mask.sum() == after[n].sum()
            if pattern == "n:m":
                m = int(name[-1])
                assert (after[n].movedim(1, -1).reshape(-1, m).sum(1) == m // 2).all()
            else:
                level = 0.3 if name.endswith("3") else 0.6
                assert abs(1 - mask.float().mean() - level) < 2 / mask.numel()
    exact = {r.name: r.sparsity_exact for r in net.subnets()}
    if pattern == "unstructured":
        total = sum(w.numel for w in net.eligible)
        assert exact["unstructured@0.6"] == pytest.approx(round(0.6 * total) / total)
    assert net.statistics.keys() == set(net.names)


def test_opposed_gradients_lose_what_opposes() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    previous: dict[str, torch.Tensor] = {}

    def correct() -> dict[str, torch.Tensor]:
        assert parameter.grad is not None
        return correct_gradients({"w": parameter.grad}, previous)

    for gradient, corrected in [((1.0, 0.0), (1.0, 0.0)), ((-3.0, 2.0), (0.0, 2.0)), ((1.0, 1.0), (1.0, 1.0))]:
        parameter.grad = torch.tensor(gradient)
        previous = correct()
        assert parameter.grad.tolist() == list(corrected)
    parameter.grad = torch.zeros(2)
    previous = correct()
    parameter.grad = -torch.ones(2)
    correct()
    assert parameter.grad.tolist() == [-1.0, -1.0]


def test_alternating_takes_no_channels() -> None:
    with pytest.raises(TrainingError, match=r"'ast' is for unstructured and n:m, and this net has channel"):
        tiny_trainer(tiny_net(patterns="channel"), recipe="ast")


def test_narrow_networks_see_other_resolutions_the_teacher_does_not() -> None:
    sides: list[tuple[str, int]] = []

    def forward(model: Any, batch: Any) -> Any:
        sides.append((net.active, batch[0].shape[-1]))
        return model(batch[0]), batch[1]

    net = tiny_net()
    tiny_trainer(net, recipe="mutualnet", forward_fn=forward).fit()
    steps = [(n, s) for n, s in sides if torch.is_grad_enabled()]
    assert {s for n, s in steps if n == "dense"} == {8}
    assert {s for n, s in steps if n != "dense"} == {8, 7, 6, 5}


def test_resolutions_are_of_the_inputs_alone() -> None:
    images, labels = torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)
    assert resized((images, labels), 0.5)[0].shape[-1] == 4
    assert resized((images, labels), 0.5)[1] is labels
    mapping = resized({"pixel_values": images, "labels": labels}, 0.5)
    assert (mapping["pixel_values"].shape[-1], mapping["labels"].shape[-1]) == (4, 8)
    assert resized(images, 1.0) is images
    with pytest.raises(TrainingError, match="a batch of type tuple has no input of floating images"):
        resized((torch.zeros(2, 3), labels), 0.5)


def test_a_batch_may_scale_itself() -> None:
    """Boxes are in their images' pixels, so a batch of them is more than its images."""

    class Batch:
        def __init__(self, images: list[torch.Tensor], boxes: torch.Tensor) -> None:
            self.images, self.boxes = images, boxes

        def resized(self, share: float) -> Batch:
            return Batch([resized(image[None], share)[0] for image in self.images], self.boxes * share)

    batch = Batch([torch.zeros(3, 8, 8), torch.zeros(3, 4, 6)], torch.tensor([[2.0, 2.0, 6.0, 8.0]]))
    half = resized(batch, 0.5)
    assert [tuple(image.shape) for image in half.images] == [(3, 4, 4), (3, 2, 3)]
    assert half.boxes.tolist() == [[1, 1, 3, 4]]
    assert resized(batch, 1.0) is batch


def test_refilled_channels_are_those_with_most_surviving_weights() -> None:
    masks: dict[str, cocktail.Mask] = {}

    def keep(event: ev.Event) -> None:
        if isinstance(event, ev.RoundStarted) and event.round == 1:
            masks.update(net.masks)

    net = tiny_net()
    trainer = tiny_trainer(net, recipe="refilling", callbacks=[keep])
    trainer.fit()
    group = next(g for g in net.coupling.groups if g.size == 16)  # conv3's, whose only producer it is
    left = masks["unstructured@0.3"].elements["conv3.weight"].flatten(1).sum(1)
    removed = masks["channel@0.2"].removed[group.start : group.stop]
    assert left[~removed].min() >= left[removed].max()
    assert all(
        set(losses) <= {"dense", r.networks[0]} for r in trainer.history.rounds if r.networks for losses in r.losses
    )
    with pytest.raises(
        TrainingError, match=r"'refilling' needs the pattern 'unstructured', and this net has n:m, channel"
    ):
        tiny_trainer(tiny_net(patterns=("1:2", "channel")), recipe="refilling")


# --------------------------------------------------------------------- options


def test_active_updates_leave_masked_weights_and_their_momentum_alone() -> None:
    from cocktailsdk.training.step.distill import Classes, Distillation
    from cocktailsdk.training.step.engine import Stepper
    from cocktailsdk.training.step.execution import Execution
    from cocktailsdk.utils.nested import default_forward

    for active in (True, False):
        net = tiny_net()
        net.train()
        optimizer = torch.optim.SGD(net.model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        execution, taught = Execution(net.model, default_forward), Distillation(0.5, None, Classes(1))
        stepper = Stepper(net, execution, F.cross_entropy, taught, active=active)
        batch = next(iter(tiny_loaders()[0]))
        stepper.step(Step((SubnetPass("dense"),)), [batch], optimizer)
        weight = net.model.conv2.weight
        before = weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone()
        stepper.step(Step((SubnetPass("unstructured@0.7"),)), [batch], optimizer)
        gone = net.mask_tensors("unstructured@0.7")["conv2.weight"] == 0
        assert torch.equal(weight[gone], before[0][gone]) is active
        assert torch.equal(optimizer.state[weight]["momentum_buffer"][gone], before[1][gone]) is active
        assert not torch.equal(weight[~gone], before[0][~gone])


def test_gradients_of_several_passes_are_added_each_under_its_own_mask() -> None:
    from cocktailsdk.training.step.distill import Classes, Distillation
    from cocktailsdk.training.step.engine import Stepper
    from cocktailsdk.training.step.execution import Execution
    from cocktailsdk.utils.nested import default_forward

    def gradients(*subnets: str) -> dict[str, torch.Tensor]:
        net = tiny_net()
        net.model.dropout.p = 0.0
        net.train()
        execution, taught = Execution(net.model, default_forward), Distillation(0.5, None, Classes(1))
        stepper = Stepper(net, execution, F.cross_entropy, taught)
        optimizer = torch.optim.SGD(net.model.parameters(), lr=0.0)
        stepper.step(Step(tuple(map(SubnetPass, subnets))), [batch], optimizer)
        return {n: p.grad.clone() for n, p in net.model.named_parameters() if p.grad is not None}

    batch = next(iter(tiny_loaders()[1]))
    subnets = ("dense", "unstructured@0.7", "channel@0.5")
    alone = [gradients(subnet) for subnet in subnets]
    for name, together in gradients(*subnets).items():
        torch.testing.assert_close(together, sum(g[name] for g in alone), rtol=1e-4, atol=1e-6)


def test_separate_statistics_change_no_weight_and_are_what_networks_end_with() -> None:
    base = dataclasses.replace(recipe_named("us-net"), schedule="rotation")
    shared = trained(base)
    separate = trained(dataclasses.replace(base, statistics="separate"))
    for name, p in shared.net.model.named_parameters():
        assert torch.equal(p, dict(separate.net.model.named_parameters())[name])
    assert set(separate.net.statistics) == set(separate.net.names)
    one, other = shared.net.statistics["channel@0.5"], separate.net.statistics["channel@0.5"]
    assert not torch.equal(one["bn2.running_mean"], other["bn2.running_mean"])


def test_a_recipe_of_ones_own_is_any_function_of_the_schedule_context() -> None:
    def twice_sparse(context: ScheduleContext) -> Step:
        names = ("dense", *context.names)
        return Step((SubnetPass(names[context.step % len(names)]),))

    recipe = Recipe(name="mine", schedule=twice_sparse)
    assert_identical(result(trained(recipe)), result(trained("paper-rotation")))
    description = trainer_of(recipe).configuration["training"]["recipe"]
    assert description["schedule"].endswith("twice_sparse")
    assert set(description) == {f.name for f in dataclasses.fields(Recipe)} - NEW


def test_fingerprints_tell_recipes_apart() -> None:
    variants = [dataclasses.replace(recipe_named("us-net"), schedule=Sandwich(between=n)) for n in (1, 3)]
    everything = [*variants, *recipes()]
    prints = [trainer_of(recipe).fingerprint for recipe in everything]
    assert all(a != b for a, b in itertools.combinations(prints, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "pivots"}, "schedule must be one of 'pivot', .*, or a function, got 'pivots'"),
        ({"masks": 3}, "masks must be one of 'umg', .*, or a function, got 3"),
        ({"update": "some"}, "update must be one of 'all', 'active', got 'some'"),
        ({"distill": 2}, "distill must be True, False or a share in 0 … 1, got 2"),
        ({"finishing": 1.0}, "finishing must be a share of the steps"),
        ({"finishing_rate": 0}, "finishing_rate must be above 0"),
        ({"weights": "own"}, "merging needs rounds that share their weights"),
        ({"rounds": "one", "merging": "none", "finishing": 0.1}, "finishing comes after"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=f"recipe 'paper': {message}"):
        dataclasses.replace(recipe_named("paper"), **change)


def test_an_unknown_recipe_is_told_which_there_are() -> None:
    with pytest.raises(TrainingError, match=r"no recipe 'papers'; there are 'cocktail'.*did you mean 'paper'"):
        tiny_trainer(recipe="papers")


def test_mask_rules_must_make_the_rounds_masks() -> None:
    recipe = Recipe(name="mine", masks=lambda pruning: {})
    with pytest.raises(TrainingError, match=r"recipe 'mine': its mask rule must make masks of .* in round 1, got none"):
        trained(recipe)
