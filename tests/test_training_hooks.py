"""A recipe in a user's own file does all that the built-in rivals do: AC/DC and AST from public names alone."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_resume import StopAt
from training_tiny import assert_identical, result, tiny_loaders, tiny_net, tiny_trainer

import cocktailsdk as cocktail
from cocktailsdk import CocktailError, TrainingError
from cocktailsdk.training import Recipe, ScheduleContext, Step, StepContext, StepHook, SubnetPass
from cocktailsdk.training import events as ev
from cocktailsdk.training.recipes import recipe_named

ENDS = (0.2, 0.5, 0.7)


class PruneAndTrain(StepHook):
    """AC/DC, in the words of its paper; the schedule is a method of the hook."""

    def sparse(self, context: ScheduleContext, step: int) -> bool:
        return sum(step >= round(end * context.steps) for end in ENDS) % 2 == 1

    def __call__(self, context: ScheduleContext) -> Step:
        names = context.names if self.sparse(context, context.step) else ("dense",)
        return Step(tuple(SubnetPass(name) for name in names))

    def before_step(self, context: StepContext) -> None:
        now = context.schedule
        sparse = self.sparse(now, now.step)
        if now.step == 0 or sparse == self.sparse(now, now.step - 1):
            return
        if not sparse:
            context.drop_optimizer_state()
            return
        if now.step == round(ENDS[-1] * now.steps):
            context.snapshot_weights("dense")
        for name in context.subnets:
            context.remake_masks([name])
            context.zero_masked_weights(name)


def one_after_another(context: ScheduleContext) -> Step:
    names = ("dense", *context.names)
    return Step((SubnetPass(names[context.step % len(names)]),))


class DropAndRegrow(StepHook):
    """AST's masks, with the schedule in a function of its own."""

    def after_backward(self, context: StepContext, subnet: str) -> None:
        now = context.schedule
        share = now.step / now.steps
        if now.step <= len(now.names) or share >= 0.75:
            return
        share = 0.3 * (1 + math.cos(math.pi * share / 0.75)) / 2
        masks = dict(context.net.masks[subnet].elements)
        for name, gradient in context.gradients.items():
            if name in masks:
                masks[name] = self.exchange(masks[name], context.parameters[name].detach(), gradient, share)
        context.set_mask(subnet, cocktail.Mask(masks))

    def exchange(self, mask: Any, weight: torch.Tensor, gradient: torch.Tensor, share: float) -> torch.Tensor:
        flat = mask.flatten().clone()
        inside, outside = flat.nonzero()[:, 0], (~flat).nonzero()[:, 0]
        count = min(round(share * len(inside)), len(outside))
        smallest = weight.flatten()[inside].abs().argsort(stable=True)[:count]
        largest = gradient.flatten()[outside].abs().argsort(descending=True, stable=True)[:count]
        flat[inside[smallest]] = False
        flat[outside[largest]] = True
        return flat.reshape(mask.shape)


class CorrectGradients(StepHook):
    """AST's gradients: what opposes the step before is taken out."""

    def __init__(self) -> None:
        self.before: dict[str, torch.Tensor] = {}

    def on_round_start(self, context: ScheduleContext) -> None:
        self.before = {}

    def before_update(self, context: StepContext) -> None:
        for name, gradient in context.gradients.items():
            if name in self.before:
                before = self.before[name]
                along = (gradient * before).sum()
                gradient -= before * torch.where(along < 0, along / before.square().sum(), torch.zeros(()))
        self.before = {name: gradient.clone() for name, gradient in context.gradients.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.before = dict(state["before"])


OWN_AC_DC = Recipe(
    name="own-ac/dc",
    schedule=PruneAndTrain(),
    masks="own",
    rounds="one",
    distill=False,
    update="active",
    merging="none",
    weights="own",
)
OWN_AST = Recipe(
    name="own-ast",
    schedule=one_after_another,
    masks="layerwise",
    rounds="one",
    distill=False,
    statistics="separate",
    merging="none",
    hooks=(DropAndRegrow(), CorrectGradients()),
)
BUILT_IN_AC_DC = recipe_named("ac/dc")
PAIRS = {
    "ac/dc": (
        OWN_AC_DC,
        dataclasses.replace(BUILT_IN_AC_DC, schedule=dataclasses.replace(BUILT_IN_AC_DC.schedule, changes=ENDS)),  # type: ignore[type-var]
        [0.5],
    ),
    "ast": (
        OWN_AST,
        dataclasses.replace(
            recipe_named("ast"),
            schedule=dataclasses.replace(recipe_named("ast").schedule, period=1),  # type: ignore[type-var]
        ),
        [0.3, 0.5],
    ),
}


def trainer_of(recipe: Recipe, sparsities: list[float], seed: int = 0, **options: Any) -> cocktail.CoTrainer:
    net = tiny_net(seed, (cocktail.Unstructured(sparsities=sparsities),))
    return tiny_trainer(net, recipe=recipe, epochs=3, **options)


@pytest.mark.parametrize("name", PAIRS)
def test_a_rival_in_a_users_own_file_gives_the_weights_of_the_built_in_one(name: str) -> None:
    own, built_in, sparsities = PAIRS[name]
    runs = [trainer_of(recipe, sparsities) for recipe in (own, built_in)]
    for run in runs:
        run.fit()
    assert_identical(result(runs[0]), result(runs[1]))
    loader = tiny_loaders()[1]
    assert runs[0].evaluate(loader) == runs[1].evaluate(loader)


@pytest.mark.parametrize("name", PAIRS)
def test_a_run_with_a_users_own_hooks_resumes_bit_identically(name: str, tmp_path: Path) -> None:
    own, _, sparsities = PAIRS[name]
    whole = trainer_of(own, sparsities)
    whole.fit()
    for n in range(20):
        run = trainer_of(own, sparsities, seed=n, out_dir=tmp_path, callbacks=[StopAt(ev.StepDone, 4)])
        try:
            run.fit()
        except KeyboardInterrupt:
            continue
        break
    assert n > 2
    assert_identical(result(run), result(whole))


def test_a_recipe_serves_many_runs_since_each_copies_its_hooks() -> None:
    hook = OWN_AST.hooks[1]
    assert isinstance(hook, CorrectGradients)
    trainer_of(OWN_AST, [0.3, 0.5]).fit()
    assert hook.before == {}


def test_ast_resumes_from_a_state_that_is_older_than_hooks(tmp_path: Path) -> None:
    from cocktailsdk.training.state.compatibility import hook_states

    recipe = PAIRS["ast"][1]
    hooks, gradients = recipe.step_hooks(), {"fc.weight": torch.ones(4, 16)}
    hooks.load_state_dict(hook_states({"gradients": gradients}, hooks))
    assert hooks.state_dict() == [gradients]
    assert hook_states({"gradients": {}}, recipe_named("cocktail").step_hooks()) == []


def test_hooks_are_part_of_the_configuration_only_where_a_recipe_names_some() -> None:
    assert all("hooks" not in recipe_named(name).describe() for name in ("cocktail", "paper", "ac/dc", "ast"))
    assert recipe_named("ast").describe()["schedule"] == {
        "class": "Alternating",
        "regrow": 0.3,
        "period": 10,
        "until": 0.75,
        "correct": True,
    }
    assert OWN_AST.describe()["hooks"] == ["DropAndRegrow", "CorrectGradients"]
    fingerprints = [
        trainer_of(dataclasses.replace(OWN_AST, hooks=OWN_AST.hooks[:n]), [0.3, 0.5]).fingerprint for n in (0, 1, 2)
    ]
    assert len(set(fingerprints)) == 3


def test_a_folder_of_a_run_with_other_hooks_is_refused(tmp_path: Path) -> None:
    trainer_of(OWN_AST, [0.3, 0.5], out_dir=tmp_path).fit()
    with pytest.raises(TrainingError, match=r"training.recipe.hooks: .*CorrectGradients"):
        trainer_of(dataclasses.replace(OWN_AST, hooks=()), [0.3, 0.5], out_dir=tmp_path).fit()


class Places(StepHook):
    """Notes where it is called, in a list that copies share."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __deepcopy__(self, memo: Any) -> Places:
        return self

    def on_round_start(self, context: ScheduleContext) -> None:
        self.calls.append(f"round {context.round} of {context.steps}")

    def before_step(self, context: StepContext) -> None:
        self.calls.append(f"step {context.schedule.step}")

    def after_backward(self, context: StepContext, subnet: str) -> None:
        assert context.net.active == "dense"
        own = context.gradients["conv2.weight"]
        masked = context.net.mask_tensors(subnet)["conv2.weight"] == 0
        assert own[masked].abs().sum() > 0
        self.calls.append(subnet)

    def before_update(self, context: StepContext) -> None:
        self.calls.append("before update")

    def after_update(self, context: StepContext) -> None:
        self.calls.append("after update")


def test_hooks_are_called_at_their_places_of_every_step() -> None:
    hook = Places()
    recipe = dataclasses.replace(recipe_named("us-net"), hooks=(hook,))
    net = tiny_net(patterns=(cocktail.Unstructured(sparsities=[0.3, 0.5]),))
    tiny_trainer(net, recipe=recipe, epochs=1).fit()
    assert hook.calls[0] == "round 1 of 6"
    subnets = ["unstructured@0.5", "unstructured@0.3"]
    expected = [[f"step {i}", *subnets, "before update", "after update"] for i in range(6)]
    assert hook.calls[1:] == [call for step in expected for call in step]


def test_a_skipped_step_leaves_masks_and_what_comes_after_the_update_undone() -> None:
    class Remake(Places):
        def after_backward(self, context: StepContext, subnet: str) -> None:
            ones = {name: torch.ones_like(m) for name, m in context.net.masks[subnet].elements.items()}
            context.set_mask(subnet, cocktail.Mask(ones))
            for gradient in context.gradients.values():
                gradient.fill_(float("nan"))

    hook, net = Remake(), tiny_net(patterns=(cocktail.Unstructured(sparsities=[0.3]),))
    recipe = dataclasses.replace(recipe_named("us-net"), schedule="rotation", hooks=(hook,))
    started: list[Any] = []

    def keep(event: ev.Event) -> None:
        if isinstance(event, ev.RoundStarted | ev.StepSkipped):
            started.append(copy.deepcopy(net.masks["unstructured@0.3"].elements))

    with pytest.raises(TrainingError, match="not one step of unstructured@0.3|unstructured@0.3"):
        tiny_trainer(net, recipe=recipe, epochs=1, on_nan="skip", callbacks=[keep]).fit()
    assert len(started) > 1
    for after in started[1:]:
        assert all(torch.equal(after[name], started[0][name]) for name in after)
    assert hook.calls.count("after update") == hook.calls.count("before update") == 3


def test_a_hook_that_is_none_is_refused() -> None:
    with pytest.raises(TrainingError, match="hooks must be a tuple of StepHook instances"):
        Recipe(name="x", hooks=(CorrectGradients,))  # type: ignore[arg-type]


def test_old_names_of_schedules_work_for_one_version_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="Moment is cocktailsdk.training.recipes.ScheduleContext now"):
        from cocktailsdk.training.recipes import Moment
    with pytest.warns(DeprecationWarning, match="Turn is cocktailsdk.training.recipes.steps.SubnetPass now"):
        from cocktailsdk.training.recipes.steps import Turn
    with pytest.warns(DeprecationWarning, match=r"SubnetPass\(network=...\) is SubnetPass\(subnet=...\) now"):
        assert Turn(network="a") == SubnetPass("a")
    with pytest.warns(DeprecationWarning, match=r"Step\(turns=...\)"):
        step = Step(turns=(SubnetPass("a"),))  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match=r"Step.turns is Step.passes now"):
        assert step.turns == (SubnetPass("a"),)  # type: ignore[attr-defined]
    with pytest.warns(DeprecationWarning, match=r"ScheduleContext.networks"):
        assert Moment(1, 0, 2, {"u": ("a",)}).networks == {"u": ("a",)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dataclasses.replace(step, leads=True).passes == step.passes


class Snapshots(StepHook):
    def __init__(self, name: str) -> None:
        self.name = name

    def before_step(self, context: StepContext) -> None:
        if context.schedule.step == 0:
            context.snapshot_weights(self.name)


def snapshot_trainer(name: str, weights: str) -> cocktail.CoTrainer:
    recipe = Recipe(name="mine", rewind=False, rounds="one", merging="none", weights=weights, hooks=(Snapshots(name),))
    return trainer_of(recipe, [0.5])


def test_a_snapshot_of_a_subnet_alone_ends_well() -> None:
    trainer = snapshot_trainer("unstructured@0.5", "own")
    net = trainer.fit()
    assert net.active == "dense"
    assert set(trainer.history.weights) >= {"unstructured@0.5"}


@pytest.mark.parametrize(("name", "weights", "error"), [("nope", "own", "no subnet"), ("dense", "shared", "weights=")])
def test_a_snapshot_that_makes_no_sense_is_refused_at_the_call(name: str, weights: str, error: str) -> None:
    with pytest.raises(CocktailError, match=error):
        snapshot_trainer(name, weights).fit()


class Forgetful(StepHook):
    def before_step(self, context: StepContext) -> None:
        if context.subnets:
            context.net.switch(context.subnets[0])


def test_a_hook_that_leaves_a_subnet_active_ends_the_run_and_is_named() -> None:
    trainer = trainer_of(Recipe(name="mine", rewind=False, rounds="one", merging="none", hooks=(Forgetful(),)), [0.5])
    with pytest.raises(TrainingError, match=r"Forgetful.before_step\(\) left 'unstructured@0.5' active"):
        trainer.fit()
    assert trainer.net.active == "dense"


@pytest.mark.parametrize("field", ["prune", "keep", "forget", "regrow", "correct"])
def test_fields_of_steps_that_became_hooks_say_what_to_write(field: str) -> None:
    with pytest.raises(TypeError, match=rf"'{field}' any more: write a cocktailsdk.training.StepHook"):
        Step((SubnetPass("dense"),), **{field: True})
