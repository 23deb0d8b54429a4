"""Private tensors: values of whole parameters that one subnetwork owns, in place of the dense network's."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import training_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_cases import sparse
from tiny import TinyNet, tiny_net
from torch import distributed as dist
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrizations import weight_norm

import cocktailsdk as cocktail
from cocktailsdk import CocktailError, SubnetError
from cocktailsdk.net.costs import stored_params
from cocktailsdk.training.events import RoundStarted

NAMES = ["unstructured@0.893", "2:4", "channel@0.613"]
HEAD = ("fc.weight", "fc.bias")


def own_values(net, parameters=HEAD, seed=1):
    """Values of some parameters that look like nothing else in the net."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(net.model.get_parameter(n).shape, generator=generator) + 10 for n in parameters}


def values(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def expected(net, dense, name):
    """A network's tensors, by hand: the private or dense values and own statistics, times the masks."""
    kept = {} if name == "dense" else net.masks[name].tensors(net.coupling)
    statistics = {} if name == "dense" else net.statistics.get(name, {})
    own = {**statistics, **net.private.get(name, {})}
    return {n: own.get(n, t) * kept[n] if n in kept else own.get(n, t) for n, t in dense.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("in_place", [False, True], ids=["other memory", "in place"])
def test_a_private_head_is_there_with_its_subnet_alone_and_the_dense_one_comes_back(name, in_place):
    net = tiny_net()
    if in_place:
        net.model.share_memory()  # such tensors are written in place, as those on a GPU are
    dense = values(net.model)
    given = own_values(net)
    net.set_private(name, given)
    assert same(values(net.model), dense)
    for other in net.names:
        with net.using(other):
            assert same(values(net.model), expected(net, dense, other))
            assert torch.equal(net.model.fc.bias, given["fc.bias"]) == (other == name)
            assert net.dense_tensor("fc.bias").equal(dense["fc.bias"])
            assert net.state_dict()["model.fc.weight"].equal(dense["fc.weight"])
    assert same(values(net.model), dense)


@pytest.mark.parametrize("name", NAMES)
def test_masked_elements_of_a_private_tensor_are_zero(name):
    net = tiny_net()
    parameters = ["widen.weight", "inner.weight", "inner.bias", "bn2.weight"]
    net.set_private(name, own_values(net, parameters))
    kept = net.masks[name].tensors(net.coupling)
    for n, t in net.private[name].items():
        if n in kept:
            assert torch.equal(t != 0, kept[n].expand(t.shape)), n
    with net.using(name, statistics=False):
        assert net.model.widen.weight.abs().max() > 5
        assert name != "2:4" or cocktail.verify_nm(net, 2, 4).ok


def test_private_tensors_are_copies_and_an_empty_mapping_removes_them():
    net = tiny_net()
    given = own_values(net)
    net.set_private("2:4", given)
    assert list(net.private) == ["2:4"] and list(net.private["2:4"]) == list(HEAD)
    given["fc.bias"].zero_()
    assert net.private["2:4"]["fc.bias"].abs().min() > 0
    with pytest.raises(TypeError):
        net.private["2:4"]["fc.bias"] = given["fc.bias"]
    net.set_private("2:4", {"fc.bias": given["fc.bias"]})
    assert list(net.private["2:4"]) == ["fc.bias"]
    net.set_private("2:4", {})
    assert not net.private


def test_another_mask_drops_private_tensors_and_private_tensors_drop_the_metric():
    net = tiny_net()
    net.recalibrate("2:4", [torch.randn(4, 3, 6, 6)])
    net.metrics["2:4"] = net.metrics["1:2"] = 0.5
    net.set_private("1:2", {})  # which had none
    net.set_private("2:4", own_values(net))
    assert net.metrics == {"1:2": 0.5} and "2:4" in net.statistics
    net.set_mask("2:4", net.masks["2:4"])
    assert not net.private


class Tied(nn.Module):
    """An embedding that is the classifier too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(6, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 6)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.hidden(self.embedding(x)).relu())


@pytest.mark.parametrize(
    ("name", "tensors", "said"),
    [
        ("3:4", {}, "3:4"),
        ("dense", {}, "the model's own parameters"),
        ("2:4", {"fc.weigth": torch.zeros(5, 16)}, "did you mean fc.weight"),
        ("2:4", {"bn1.running_mean": torch.zeros(8)}, "it is a buffer"),
        ("2:4", {"fc.weight": torch.zeros(5, 15)}, r"shape \(5, 16\)"),
        ("2:4", {"fc.weight": torch.zeros(5, 16, dtype=torch.float64)}, "torch.float32"),
        ("2:4", {"fc.weight": [1.0]}, "not list"),
    ],
)
def test_private_tensors_that_cannot_be_are_refused_and_nothing_changes(name, tensors, said):
    net = tiny_net()
    net.set_private("2:4", own_values(net))
    before = net.private["2:4"]["fc.weight"]
    with pytest.raises(SubnetError, match=said):
        net.set_private(name, tensors)
    assert net.private["2:4"]["fc.weight"] is before


def test_tied_parameters_have_no_private_tensors():
    torch.manual_seed(0)
    net = cocktail.sparsify(Tied(), ["2:4"], example_inputs=(torch.zeros(2, 3, dtype=torch.long),))
    with pytest.raises(SubnetError, match=r"would change 'head\.weight' too"):
        net.set_private("2:4", {"embedding.weight": torch.zeros(6, 8)})
    with pytest.raises(SubnetError, match=r"it is tied to 'embedding\.weight'"):
        net.set_private("2:4", {"head.weight": torch.zeros(6, 8)})
    net.set_private("2:4", {"head.bias": torch.ones(6)})


def test_parameters_may_lie_one_after_another_in_one_memory_but_not_overlap():
    net = tiny_net()
    memory = torch.randn(26)
    for parameter, part in ((net.model.inner.bias, memory[:16]), (net.model.fc.bias, memory[16:21])):
        parameter.data = part
    dense = values(net.model)
    net.set_private("2:4", own_values(net, ["fc.bias"]))
    with net.using("2:4"):
        assert same(values(net.model), expected(net, dense, "2:4"))
    assert same(values(net.model), dense)
    net.model.fc.bias.data = memory[12:17]
    with pytest.raises(SubnetError, match=r"would change 'inner\.bias' too"):
        net.set_private("2:4", own_values(net, ["fc.bias"]))


def test_private_tensors_change_while_the_dense_network_is_active():
    net = tiny_net()
    net.switch("2:4")
    with pytest.raises(SubnetError, match="switch\\('dense'\\) first"):
        net.set_private("1:2", own_values(net))
    net = cocktail.sparsify(TinyNet().eval(), ["2:4"], example_inputs=(torch.randn(2, 3, 6, 6),))
    net._masks.clear()
    with pytest.raises(SubnetError, match="has no mask yet"):
        net.set_private("2:4", own_values(net))


def test_preloaded_private_tensors_are_used_until_they_change():
    net = tiny_net()
    dense = values(net.model)
    for i, name in enumerate(NAMES):
        net.set_private(name, own_values(net, seed=i))
    assert net.preload(*NAMES).preloaded == NAMES
    for name in [*NAMES, *NAMES]:
        net.switch(name)
        assert same(values(net.model), expected(net, dense, name))
    net.switch("dense")
    assert same(values(net.model), dense) and net.preloaded == NAMES
    net.set_private("2:4", own_values(net, seed=7))
    net.private["channel@0.613"]["fc.bias"].add_(1)
    assert net.preloaded == ["unstructured@0.893"]
    for name in NAMES:
        net.switch(name)
        assert same(values(net.model), expected(net, dense, name))
    net.switch("dense")
    assert same(values(net.model), dense)


@pytest.mark.parametrize("preloaded", [False, True])
def test_a_write_to_a_private_tensor_is_refused_kept_as_private_or_discarded(preloaded):
    net = tiny_net()
    net.set_private("channel@0.613", own_values(net))
    before, dense = net.private["channel@0.613"]["fc.weight"].clone(), values(net.model)

    def write():
        if preloaded:
            net.preload("channel@0.613")
        net.switch("channel@0.613")
        with torch.no_grad():
            net.model.fc.weight.add_(3)

    write()
    with pytest.raises(SubnetError, match=r"fc\.weight changed while 'channel@0\.613' was active"):
        net.switch("dense")
    with pytest.raises(SubnetError, match=r"fc\.weight changed"):
        net.dense_tensor("fc.weight")
    net.switch("dense", changes="discard")
    assert same(values(net.model), dense)
    assert torch.equal(net.private["channel@0.613"]["fc.weight"], before)

    write()
    net.switch("2:4", changes="keep")
    net.switch("dense")
    assert same(values(net.model), dense)
    kept = net.masks["channel@0.613"].tensors(net.coupling)["fc.weight"]
    assert torch.equal(net.private["channel@0.613"]["fc.weight"], (before + 3) * kept)
    net.switch("channel@0.613")
    assert same(values(net.model), expected(net, dense, "channel@0.613"))


def test_a_kept_write_to_other_weights_is_the_dense_networks():
    net = tiny_net()
    net.set_private("2:4", own_values(net))
    private = net.private["2:4"]["fc.weight"]
    net.switch("2:4")
    with torch.no_grad():
        net.model.widen.weight.add_(1)
    written = net.model.widen.weight.detach().clone()
    net.switch("dense", changes="keep")
    assert torch.equal(net.model.widen.weight, written)
    assert net.private["2:4"]["fc.weight"] is private


def test_an_error_inside_using_drops_what_was_written_to_a_private_tensor():
    net = tiny_net()
    net.set_private("2:4", own_values(net))
    dense = values(net.model)

    def write_and_fail():
        with net.using("2:4"):
            net.model.fc.bias.data.zero_()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_and_fail()
    assert same(values(net.model), dense)
    with net.using("2:4"):
        assert same(values(net.model), expected(net, dense, "2:4"))


def test_a_changed_model_gets_the_dense_values_back():
    net = tiny_net()
    net.set_private("2:4", own_values(net))
    dense = values(net.model)
    net.switch("2:4")
    net.model.more = nn.Linear(2, 2)
    with pytest.raises(CocktailError, match="'more'"):
        net.switch("dense")
    del net.model.more
    assert same(values(net.model), dense)


def test_copies_and_files_of_a_net_have_its_private_tensors():
    net = tiny_net()
    net.set_private("2:4", own_values(net))
    dense = values(net.model)
    net.switch("2:4")
    active = values(net.model)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for made in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert made.active == "2:4" and same(values(made.model), active)
        made.switch("dense")
        assert same(values(made.model), dense)
        made.set_private("2:4", {})
        made.switch("2:4")
        assert same(values(made.model), expected(made, dense, "2:4"))
        assert net.private["2:4"] and same(values(net.model), active)
    net.load_state_dict({f"model.{n}": t + 1 for n, t in dense.items()})
    assert torch.equal(net.model.fc.bias, active["fc.bias"])
    assert torch.equal(net.switch("dense").model.fc.bias, dense["fc.bias"] + 1)


def test_private_tensors_follow_a_model_into_another_dtype():
    net = tiny_net()
    net.set_private("2:4", own_values(net))
    net.double()
    with net.using("2:4"):
        assert torch.equal(net.model.fc.bias, net.private["2:4"]["fc.bias"].double())
    assert net.preload("2:4").preloaded == ["2:4"]
    net.switch("2:4").switch("dense")


def test_private_tensors_given_under_inference_mode_can_be_preloaded_and_trained_around():
    net = tiny_net()
    dense = values(net.model)
    with torch.inference_mode():
        net.set_private("2:4", own_values(net))
        assert net.preload("2:4").preloaded == ["2:4"]
        net.switch("2:4")
    assert same(values(net.model), expected(net, dense, "2:4"))
    net(torch.randn(2, 3, 6, 6)).sum().backward()
    assert net.switch("dense").model.fc.weight.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_slim_and_exported_subnets_have_their_private_head(name, tmp_path):
    net = tiny_net()
    (x,) = net.example[0]
    net.set_private(name, own_values(net))
    net.recalibrate(name, [torch.randn(4, 3, 6, 6)])
    with net.using(name), torch.no_grad():
        masked = net(x)
        head = {n: net.model.get_parameter(n).clone() for n in HEAD}
    slim = net.slim(name)
    with torch.no_grad():
        assert torch.allclose(slim(x), masked, rtol=1e-5, atol=1e-5)
    kept = (head["fc.weight"] != 0).any(0)
    assert torch.equal(slim.fc.weight, head["fc.weight"][:, kept]) and torch.equal(slim.fc.bias, head["fc.bias"])
    net.export(name, tmp_path / "slim.pt2")
    again = torch.export.load(tmp_path / "slim.pt2").module()
    with torch.no_grad():
        assert torch.allclose(again(x), masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["unstructured@0.5", "2:4", "heads@0.5", "heads@0.5+2:4"])
def test_a_transformers_head_and_norms_may_be_private(name):
    net = sparse("transformer", [name])
    (x,) = net.example[0]
    parameters = [n for n in net.coupling.shapes if "norm" in n or n.startswith(("fc", "head", "last", "out"))]
    assert len(parameters) > 3
    dense = values(net.model)
    net.set_private(name, own_values(net, parameters))
    with net.using(name), torch.no_grad():
        assert same(values(net.model), expected(net, dense, name))
        masked = net(x)
    assert same(values(net.model), dense)
    with torch.no_grad():
        assert torch.allclose(net.slim(name)(x), masked, rtol=1e-4, atol=1e-4)


def test_views_have_private_tensors_of_their_own_and_share_the_rest():
    net = tiny_net()
    names = ["dense", "channel@0.1", "channel@0.469", "channel@0.613"]
    net.set_private("channel@0.469", own_values(net, ["widen.weight"]))
    net.set_private("channel@0.613", own_values(net))
    dense = values(net.model)
    views = net.views(names)
    (x,) = net.example[0]
    for name in names:
        with net.using(name), torch.no_grad():
            assert torch.allclose(views[name](x), net(x), rtol=1e-4, atol=1e-4)
        apart = {n for n in views.copied[name] if "running" not in n and "num_batches" not in n}
        assert apart == net.private.get(name, {}).keys()
    assert torch.equal(views.shared["fc.bias"], dense["fc.bias"])
    assert torch.equal(views["dense"].fc.bias, dense["fc.bias"])
    assert same(values(net.model), dense)


@pytest.mark.parametrize("removes", ["channel@0.5", "unstructured@0.5", "2:4"])
def test_the_masks_of_some_parameters_are_those_of_all(removes):
    torch.manual_seed(0)
    model = nn.Sequential(
        weight_norm(nn.Linear(8, 12)), nn.ReLU(), weight_norm(nn.Linear(12, 12)), nn.ReLU(), nn.Linear(12, 4)
    )
    net = cocktail.sparsify(model, [removes], example_inputs=(torch.randn(2, 8),))
    whole = net.masks[removes].tensors(net.coupling)
    assert whole
    for name in net.coupling.shapes:
        found = net.masks[removes].of(net.coupling, [name])
        assert found.keys() == {name} & whole.keys()
        assert all(torch.equal(found[n], whole[n]) for n in found)


def test_bytes_and_parameters_of_private_tensors_are_counted_without_what_is_masked():
    net = tiny_net()
    before = stored_params(net.coupling, net.masks, {})
    net.set_private("channel@0.613", own_values(net))
    net.set_private("2:4", own_values(net, ["widen.weight"]))
    reports = {r.name: r for r in net.subnets()}
    left = int((~net.masks["channel@0.613"].removed[8:]).sum())
    assert reports["channel@0.613"].private_bytes == 4 * (5 * left + 5)
    assert reports["2:4"].private_bytes == 4 * 16 * 8 * 9 // 2
    assert reports["dense"].private_bytes == reports["1:2"].private_bytes == 0
    assert stored_params(net.coupling, net.masks, {}, net.private) == before + 5 * left + 5 + 576


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="gloo is not built in")
def test_a_sharded_model_refuses_private_tensors_before_anything_changes(one_process):
    net = tiny_net()
    net.set_private("2:4", own_values(net))
    fully_shard(net.model, mesh=one_process)
    net.switch("1:2")
    with pytest.raises(SubnetError, match=r"sharded \(FSDP2\): remove them"):
        net.switch("2:4")
    assert net.active == "1:2"
    net.switch("dense")
    with pytest.raises(SubnetError, match=r"the parameter is sharded \(FSDP2\)"):
        net.set_private("1:2", own_values(tiny_net()))
    net.set_private("2:4", {})
    net.switch("2:4").switch("dense")


def training_net():
    """A net of the trainer's tests whose every subnet owns a head."""
    net = training_tiny.tiny_net()
    for name in net.names[1:]:
        net.set_private(name, own_values(net))
    return net


def test_a_run_begins_without_private_tensors_and_a_plan_leaves_them():
    net = training_net()
    seen = []

    def watch(event):
        if isinstance(event, RoundStarted):
            seen.append(dict(net.private))
            raise KeyboardInterrupt

    trainer = training_tiny.tiny_trainer(net, callbacks=[watch])
    trainer.plan()
    assert list(net.private) == net.names[1:]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert seen == [{}] and not net.private


def test_a_loop_of_ones_own_begins_without_private_tensors():
    net = training_net()
    loop = cocktail.CoLoop(net, 48)
    state = loop.state_dict()
    assert net.private
    loop.begin()
    assert not net.private
    other = training_net()
    cocktail.CoLoop(other, 48).load_state_dict(state)
    assert not other.private


def test_finetuning_starts_from_the_subnets_private_values():
    net = training_net()
    loader, _ = training_tiny.tiny_loaders()
    seen = []

    def loss_fn(output, target):
        seen.append(output.detach())
        return (0 * output).sum()

    options = {"epochs": 1, "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}
    tuned = cocktail.finetune(net, "1:2", loader, loss_fn, **options, metric=lambda output, target: output.mean(1))
    assert not tuned.private and seen[0].mean() > 8
    assert torch.equal(tuned.model.fc.bias, net.private["1:2"]["fc.bias"])


STEPS = st.one_of(
    st.tuples(st.just("switch"), st.integers(0, 5)),
    st.tuples(st.just("using"), st.integers(0, 5), st.integers(0, 5)),
    st.tuples(st.just("preload"), st.lists(st.integers(1, 5), max_size=3)),
    st.tuples(
        st.just("private"),
        st.integers(1, 5),
        st.lists(st.sampled_from(["fc.weight", "fc.bias", "widen.weight", "bn2.weight", "inner.bias"]), unique=True),
        st.integers(0, 9),
    ),
    st.tuples(st.just("dense"), st.integers(0, 9)),
    st.tuples(st.just("write"), st.sampled_from(["keep", "discard"])),
)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.lists(STEPS, min_size=3, max_size=12))
def test_any_way_of_switching_gives_what_masks_and_private_tensors_say(steps):
    net = tiny_net()
    names = ["dense", *NAMES, "1:2", "channel@0.1"]
    dense = values(net.model)  # the naive model: dense values, and private ones by subnet, multiplied by hand
    private = {}

    def assert_right(name, tensors=None):
        kept = {} if name == "dense" else net.masks[name].tensors(net.coupling)
        for n, now in tensors or net.model.state_dict().items():
            value = private.get(name, {}).get(n, dense[n])
            assert torch.equal(now, value * kept[n] if n in kept else value), (name, n)

    for what, *given_ in steps:
        if what == "switch":
            net.switch(names[given_[0]])
        elif what == "using":
            with net.using(names[given_[0]], statistics=False):
                assert_right(names[given_[0]], net.model.named_parameters())
                with net.using(names[given_[1]]):
                    assert_right(names[given_[1]])
        elif what == "preload":
            net.preload(*(names[i] for i in given_[0]))
        elif what == "private":
            net.switch("dense")
            private[names[given_[0]]] = own_values(net, given_[1], seed=given_[2])
            net.set_private(names[given_[0]], private[names[given_[0]]])
        elif what == "dense":
            net.switch("dense")
            with torch.no_grad():
                net.model.fc.weight.mul_(1 + given_[0])
            dense = values(net.model)
        elif net.active != "dense" and (own := private.get(net.active)):
            name, parameter = net.active, next(iter(own))
            with torch.no_grad():
                net.model.get_parameter(parameter).add_(1)
            if given_[0] == "keep":
                own[parameter] = own[parameter] + 1
            net.switch("dense", changes=given_[0])
            net.switch(name)
        assert_right(net.active)
    net.switch("dense")
    assert same(values(net.model), dense)
