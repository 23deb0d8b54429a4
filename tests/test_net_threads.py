"""Several threads use one net: every request sees one subnetwork from start to end."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import tiny_net

from cocktailsdk import SubnetError
from cocktailsdk.net.rwlock import ReadWriteLock

WAIT = 30.0  # seconds after which something hangs


def outputs(net, x):
    found = {}
    with torch.inference_mode():
        for name in net.names:
            with net.using(name):
                found[name] = net(x)
    return found


def paused(net):
    """Two events: the forward pass has come to the middle, and may go on."""
    here, on = threading.Event(), threading.Event()

    def wait(*_):
        here.set()
        assert on.wait(WAIT)

    return here, on, net.model.widen.register_forward_hook(wait)


@pytest.mark.parametrize("preload", [False, True])
def test_every_output_is_that_of_one_subnetwork(preload):
    net, x = tiny_net(), tiny_net().example[0][0]
    known = outputs(net, x)
    assert len({tuple(y.flatten().tolist()) for y in known.values()}) > 15  # masks that differ, outputs that differ
    dense = {n: t.clone() for n, t in net.model.state_dict().items()}
    names = ["dense", "unstructured@0.488", "2:4", "channel@0.469", "unstructured@0.893", "channel@0.651"]
    if preload:
        net.preload("2:4", "channel@0.469")
    stop = threading.Event()
    started = threading.Barrier(5)

    def requests():
        started.wait(WAIT)
        seen = []
        while not stop.is_set() or len(seen) < 20:
            with torch.inference_mode():
                seen.append(net(x))
        return seen

    def switching():
        started.wait(WAIT)
        for i in range(60):
            net.switch(names[i % len(names)])
            with net.using(names[(i * 5 + 2) % len(names)]) as used, torch.inference_mode():
                assert torch.equal(net(x), known[used.active])
        stop.set()

    with ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(requests) for _ in range(4)]
        writer = pool.submit(switching)
        writer.result(WAIT)
        seen = [y for r in readers for y in r.result(WAIT)]
    assert all(any(torch.equal(y, known[n]) for n in names) for y in seen)
    net.switch("dense")
    assert all(torch.equal(t, dense[n]) for n, t in net.model.state_dict().items())


def test_a_switch_waits_for_requests_that_run_and_those_that_come_later_wait_for_it():
    net, x = tiny_net(), tiny_net().example[0][0]
    known = outputs(net, x)
    here, on, hook = paused(net)
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(net, x)
        assert here.wait(WAIT)
        hook.remove()  # only the first pass waits
        switch = pool.submit(net.switch, "2:4")
        while not net._lock._writes:  # until the switch waits for the lock
            pass
        later = pool.submit(net, x)
        assert net.active == "dense"
        assert not switch.done()
        assert not later.done()
        on.set()
        assert torch.equal(first.result(WAIT), known["dense"])
        switch.result(WAIT)
        assert torch.equal(later.result(WAIT), known["2:4"])


def test_subnetworks_are_preloaded_while_requests_run():
    net, x = tiny_net(), tiny_net().example[0][0]
    known = outputs(net, x)
    here, on, hook = paused(net)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(net, x)
        assert here.wait(WAIT)
        hook.remove()
        net.preload("2:4")  # would never return if it waited
        assert net.preloaded == ["2:4"]
        assert torch.equal(net(x), known["dense"])  # nor would another request
        on.set()
        assert torch.equal(first.result(WAIT), known["dense"])


def test_within_using_a_thread_has_the_net_to_itself():
    net, x = tiny_net(), tiny_net().example[0][0]
    known = outputs(net, x)
    with ThreadPoolExecutor(2) as pool:
        with net.using("2:4"):
            request, other = pool.submit(net, x), pool.submit(net.switch, "channel@0.1")
            with net.using("channel@0.469"):
                assert torch.equal(net(x), known["channel@0.469"])
            assert torch.equal(net(x), known["2:4"])
            assert not request.done()
            assert not other.done()
        other.result(WAIT)
        y = request.result(WAIT)
    assert any(torch.equal(y, known[n]) for n in ("dense", "channel@0.1"))
    assert net.active == "channel@0.1"


def test_who_holds_the_active_subnetwork_may_call_the_model_as_often_as_is_needed():
    net, x = tiny_net(), tiny_net().example[0][0]
    known = outputs(net, x)
    net.switch("2:4")
    with ThreadPoolExecutor(1) as pool:
        with net.hold() as name, net.hold():
            assert name == "2:4"
            switch = pool.submit(net.switch, "dense")
            while not net._lock._writes:
                pass
            assert torch.equal(net.model(x), known["2:4"])
            assert torch.equal(net(x), known["2:4"])  # not held up by the switch that waits for it
            assert net.state_dict()["model.widen.weight"].count_nonzero() == net.model.widen.weight.numel()
            for change in (net.switch, net.preload, lambda name: net.using(name).__enter__()):
                with pytest.raises(SubnetError, match="one subnet from start to end"):
                    change("1:2")
        switch.result(WAIT)
    assert net.active == "dense"


def test_a_forward_pass_may_not_switch_its_own_net():
    net, x = tiny_net(), tiny_net().example[0][0]
    net.model.widen.register_forward_hook(lambda *_: net.switch("2:4") and None)
    with pytest.raises(SubnetError, match="one subnet from start to end"):
        net(x)
    with net.using("1:2"), pytest.raises(SubnetError, match="before it or after it"):
        net(x)
    assert net.active == "dense"
    net.model.widen._forward_hooks.clear()
    net.switch("2:4")  # nothing is left locked


def test_an_exception_leaves_nothing_locked():
    net, x = tiny_net(), tiny_net().example[0][0]
    with pytest.raises(RuntimeError):
        net(x[:, :1])
    with pytest.raises(SubnetError), net.using("nothing"):
        pass
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(net.switch, "2:4").result(WAIT).active == "2:4"


def test_a_backward_pass_may_run_the_net_again_in_a_thread_of_its_own():
    net, x = tiny_net(), tiny_net().example[0][0]
    again = []
    with net.using("2:4"), ThreadPoolExecutor(1) as pool:  # as checkpointed code does in the threads of a GPU
        y = net(x)
        y.register_hook(lambda _: again.append(net(x)))
        pool.submit(y.sum().backward).result(WAIT)
        assert torch.equal(again[0], y)


def test_copies_have_locks_of_their_own():
    net, x = tiny_net(), tiny_net().example[0][0]
    with net.using("2:4"):
        twin = copy.deepcopy(net)
        with ThreadPoolExecutor(1) as pool:
            assert torch.equal(pool.submit(twin, x).result(WAIT), net(x))
    assert isinstance(pickle.loads(pickle.dumps(ReadWriteLock())), ReadWriteLock)
