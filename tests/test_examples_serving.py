"""The serving example: what its service answers to good and bad requests, floods and slow clients."""

# ruff: noqa: E402  what is imported may not be installed

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package, reason=f'{package} is not installed: pip install "cocktailsdk[serving]"')

import httpx
from cocktail_serving.app import create_app
from cocktail_serving.controller import Controller, Policy, Rung
from cocktail_serving.engine import Engine
from cocktail_serving.inputs import CONTENT_TYPE, Expected, Refused
from cocktail_serving.networks import Network, example_of, networks_of
from cocktail_serving.server import server_of
from cocktail_serving.settings import Limits

import cocktailsdk as cocktail
from cocktailsdk.presets.models import DigitsNet

SERVE = Path(__file__).resolve().parent.parent / "examples" / "serving" / "serve.py"
WAIT = 30.0


@pytest.fixture(scope="module")
def net() -> cocktail.CocktailNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitsNet((8, 16, 32)).eval()
    net = cocktail.sparsify(model, [cocktail.Channel(rounds=3, rate=0.3)], example_inputs=(torch.zeros(1, 1, 8, 8),))
    net.metrics.update({name: 0.9 - 0.1 * i for i, name in enumerate(net.names)})
    return net


@pytest.fixture(scope="module")
def networks(net: cocktail.CocktailNet) -> list[Network]:
    return networks_of(net, only=net.names, repeats=1)


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def body(values: torch.Tensor | np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(values))
    return file.getvalue()


HEADERS = {"content-type": CONTENT_TYPE}


class Service:
    """An engine and its application; requests reach it without a socket."""

    def __init__(self, networks: list[Network], **limits: float) -> None:
        self.limits = Limits(**{"batch": 8, "body_bytes": 4096, "queue": 4, **limits})
        # Costs of no meaning here: tests switch by themselves, or let a load decide.
        rungs = [Rung(n.name, 1e-6) for n in networks]
        self.engine = Engine(
            {n.name: n for n in networks}, Controller(rungs, Policy(goal=1e3, dwell=1e6)), queue=self.limits.queue
        )
        expected = Expected((1, 8, 8), np.dtype("float32"), self.limits.batch)
        self.app = create_app(self.engine, expected, self.limits)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app)
        async with (
            self.app.router.lifespan_context(self.app),
            httpx.AsyncClient(transport=transport, base_url="http://service") as client,
        ):
            yield client

    def use(self, name: str) -> None:
        """Have the controller be at a network, as after a decision."""
        before = self.engine.controller.active
        self.engine.controller._go(self.engine.controller._place[name], time.monotonic(), 0)
        for w in self.engine.watchers:
            w.switched(before, name)


async def ask(client: httpx.AsyncClient, values: torch.Tensor | np.ndarray) -> httpx.Response:
    return await client.post("/predict", content=body(values), headers=HEADERS)


def same(answer: httpx.Response, networks: list[Network], examples: torch.Tensor) -> str:
    """The network that answered; its outputs are the network's, bit for bit."""
    assert answer.status_code == 200, answer.text
    told = answer.json()
    network = next(n for n in networks if n.name == told["network"])
    outputs = network(examples)
    assert torch.equal(torch.tensor(told["outputs"]), outputs)
    assert told["classes"] == outputs.argmax(1).tolist()
    assert told["accuracy_expected"] == network.accuracy
    return network.name


def test_a_request_is_answered_by_the_active_network(networks: list[Network]) -> None:
    async def run() -> None:
        service, x = Service(networks), images(3)
        async with service.client() as client:
            for network in networks:
                if network.name != service.engine.active.name:
                    service.use(network.name)
                assert same(await ask(client, x), networks, x) == network.name

    asyncio.run(run())


def test_views_compute_what_the_net_does(net: cocktail.CocktailNet, networks: list[Network]) -> None:
    x = images(4)
    for network in networks:
        with net.using(network.name), torch.no_grad():
            torch.testing.assert_close(network(x), net(x), rtol=1e-4, atol=1e-4)


def test_while_networks_are_switched_every_answer_is_wholly_one_networks(networks: list[Network]) -> None:
    async def run() -> set[str]:
        service, seen = Service(networks, queue=64), set()
        async with service.client() as client:

            async def requests(k: int) -> None:
                for i in range(12):
                    x = images(1 + (i + k) % 4, seed=100 * k + i)
                    seen.add(same(await ask(client, x), networks, x))

            async def switching() -> None:
                for i in range(2000):
                    name = networks[i % len(networks)].name
                    if name != service.engine.active.name:
                        service.use(name)
                    await asyncio.sleep(0.001)

            switches = asyncio.create_task(switching())
            await asyncio.gather(*(requests(k) for k in range(4)))
            switches.cancel()
        return seen

    assert len(asyncio.run(run())) > 1


BAD = {
    "another type of body": (415, b"{}", {"content-type": "application/json"}),
    "too many bytes": (413, body(torch.zeros(40, 1, 8, 8)), HEADERS),
    "bytes that are no array": (400, b"no array", HEADERS),
    "nothing": (400, b"", HEADERS),
    "a pickle": (422, body(np.array([{}], dtype=object)), HEADERS),
    "fewer values than announced": (400, body(images(2))[:-4], HEADERS),
    "more values than announced": (400, body(images(2)) + b"more", HEADERS),
    "another shape": (422, body(torch.zeros(1, 1, 9, 8)), HEADERS),
    "no batch": (422, body(torch.zeros(1, 8, 8)), HEADERS),
    "another dtype": (422, body(torch.zeros(1, 1, 8, 8, dtype=torch.float64)), HEADERS),
    "other bytes' order": (422, body(images(1).numpy().astype(">f4")), HEADERS),
    "columns first": (422, body(np.asfortranarray(images(2).numpy())), HEADERS),
    "no example": (422, body(torch.zeros(0, 1, 8, 8)), HEADERS),
    "too many examples": (422, body(torch.zeros(9, 1, 8, 8)), HEADERS),
    "values that are not finite": (422, body(torch.full((1, 1, 8, 8), float("nan"))), HEADERS),
    "values that the network cannot take": (422, body(torch.full((1, 1, 8, 8), 3e38)), HEADERS),
}


def test_bad_requests_are_told_what_is_wrong_and_good_ones_go_on(networks: list[Network]) -> None:
    async def run() -> None:
        service = Service(networks)
        async with service.client() as client:
            for what, (status, content, headers) in BAD.items():
                answer = await client.post("/predict", content=content, headers=headers)
                assert (what, answer.status_code) == (what, status)
                assert answer.json()["error"]
            assert (await client.get("/predict")).status_code == 405
            assert (await client.get("/docs")).status_code == 404
            x = images(8)
            same(await ask(client, x), networks, x)
            text = (await client.get("/metrics")).text
        assert 'cocktail_requests_total{status="413"} 1.0' in text
        assert 'cocktail_requests_total{status="200"} 1.0' in text

    asyncio.run(run())


def test_a_body_that_grows_beyond_the_limit_without_saying_so_is_refused(networks: list[Network]) -> None:
    async def endless() -> AsyncIterator[bytes]:
        sent = 0
        while True:
            sent += 1
            assert sent < 100, "the service goes on reading"
            yield b"x" * 1000

    async def run() -> int:
        async with Service(networks).client() as client:
            return (await client.post("/predict", content=endless(), headers=HEADERS)).status_code

    assert asyncio.run(run()) == 413


def test_mutated_bodies_are_answered_or_refused(networks: list[Network]) -> None:
    expected, good = Expected((1, 8, 8), np.dtype("float32"), 8), body(images(1))
    random, refused = np.random.default_rng(0), 0
    for _ in range(2000):
        bad = bytearray(good)
        for at in random.integers(0, 128, size=random.integers(1, 6)):
            bad[at] = random.integers(0, 256)
        try:
            read = expected.read(bytes(bad))
        except Refused as error:
            refused += error.status in (400, 422)
        else:
            assert read.shape == (1, 1, 8, 8)
    assert refused > 1000


@contextlib.contextmanager
def held(network: Network) -> Iterator[threading.Event]:
    """While this lasts, or until the event is set, runs of a network come to no end."""
    go = threading.Event()
    hook = network.model.register_forward_pre_hook(lambda *_: go.wait(WAIT) and None)
    try:
        yield go
    finally:
        go.set()
        hook.remove()


async def until(what: object) -> None:
    async with asyncio.timeout(WAIT):
        while not what():  # type: ignore[operator]
            await asyncio.sleep(0.005)


def test_a_flood_fills_a_bounded_queue_and_the_rest_is_told_to_come_back(networks: list[Network]) -> None:
    async def run() -> None:
        service, x = Service(networks), images(1)
        async with service.client() as client:
            with held(networks[0]) as go:
                first = asyncio.create_task(ask(client, x))
                await until(lambda: service.engine._examples == 1 and not service.engine.waiting)
                flood = [asyncio.create_task(ask(client, x)) for _ in range(40)]
                await until(lambda: sum(t.done() for t in flood) == 36)
                assert service.engine.waiting == 4
                text = (await client.get("/metrics")).text
                assert "cocktail_queue_length 4.0" in text
                assert (await client.get("/health/ready")).status_code == 200
                go.set()
                answers = await asyncio.gather(*flood)
            refused = [a for a in answers if a.status_code == 503]
            assert len(refused) == 36
            assert all(int(a.headers["retry-after"]) >= 1 for a in refused)
            for answer in [await first, *(a for a in answers if a.status_code != 503)]:
                same(answer, networks, x)
            text = (await client.get("/metrics")).text
            assert 'cocktail_requests_total{status="503"} 36.0' in text

    asyncio.run(run())


def test_requests_that_waited_too_long_are_given_up_and_not_run(networks: list[Network]) -> None:
    async def run() -> None:
        service, x = Service(networks, answer_seconds=0.05), images(1)
        async with service.client() as client:
            with held(networks[0]) as go:
                answers = await asyncio.gather(*(ask(client, x) for _ in range(3)))
                assert [a.status_code for a in answers] == [504] * 3
                go.set()
                await until(lambda: not service.engine.waiting)
            text = (await client.get("/metrics")).text
        assert re.search(r'cocktail_examples_total\{network="dense"\} 0\.0', text)

    asyncio.run(run())


def test_a_network_that_fails_fails_one_request(networks: list[Network], caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        service, x = Service(networks), images(1)
        async with service.client() as client:
            hook = networks[0].model.register_forward_pre_hook(lambda *_: 1 / 0)
            assert (await ask(client, x)).status_code == 500
            hook.remove()
            same(await ask(client, x), networks, x)
            assert (await client.get("/health/live")).status_code == 200

    asyncio.run(run())
    assert "ZeroDivisionError" in caplog.text


def test_load_makes_the_service_switch_and_the_page_and_metrics_tell(networks: list[Network]) -> None:
    async def run() -> None:
        service, x = Service(networks), images(1)
        times = iter(np.arange(0, 1e4, 0.5))
        service.engine._clock = lambda: float(next(times))  # requests take long by this clock
        names = [n.name for n in networks]
        service.engine.controller = Controller([Rung(n, 1.0 / (i + 1)) for i, n in enumerate(names)], Policy(goal=1.0))
        async with service.client() as client:
            for _ in range(6):
                same(await ask(client, x), networks, x)
                service.engine.look()
            active = service.engine.active
            assert active.name != "dense"
            text = (await client.get("/metrics")).text
            assert f'cocktail_active_network{{network="{active.name}"}} 1.0' in text
            assert 'cocktail_active_network{network="dense"} 0.0' in text
            assert f"cocktail_accuracy_expected {active.accuracy}" in text
            assert re.search(r'cocktail_switches_total\{network="channel[^}]*"\} [1-9]', text)
            assert re.search(r"cocktail_request_latency_seconds_count 6.0", text)
            told = (await client.get("/history")).json()
            assert [n["name"] for n in told["networks"]] == names
            assert told["seconds"][-1]["network"] == active.name
            assert sum(s["answered"] for s in told["seconds"]) > 0
            last = told["seconds"][-1]["number"]
            later = (await client.get("/history", params={"after": last})).json()["seconds"]
            assert all(s["number"] > last for s in later)
            page = await client.get("/")
            assert page.headers["content-security-policy"].startswith("default-src 'none'")
            outside = re.findall(r"(?:src|href|url|import|@import)[=( ]+[\"']?(?:https?:)?//", page.text)
            assert outside == []

    asyncio.run(run())


def test_only_models_of_one_tensor_are_served(net: cocktail.CocktailNet) -> None:
    assert example_of(net).shape == (1, 1, 8, 8)
    before = net.example
    try:
        net.example = None
        with pytest.raises(ValueError, match="one tensor"):
            example_of(net)
    finally:
        net.example = before


@contextlib.contextmanager
def listening(service: Service) -> Iterator[int]:
    """The service behind a real web server on a free port; at the end it is told to stop, and has to."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(128)
        port = s.getsockname()[1]
        server = server_of(service.app, service.limits, log_config=None)
        thread = threading.Thread(target=server.run, args=([s],))
        thread.start()
        try:
            waited = time.monotonic()
            while not server.started:
                assert time.monotonic() - waited < WAIT
                time.sleep(0.01)
            yield port
        finally:
            server.should_exit = True
            thread.join(WAIT)
            assert not thread.is_alive()


def sent(port: int, examples: torch.Tensor) -> httpx.Response:
    url = f"http://127.0.0.1:{port}/predict"
    return httpx.post(url, content=body(examples), headers=HEADERS, timeout=WAIT, trust_env=False)


def until_closed(s: socket.socket) -> bytes:
    s.settimeout(WAIT)
    found = b""
    while chunk := s.recv(4096):
        found += chunk
    return found


def test_slow_clients_are_closed_and_hold_nobody_up(networks: list[Network]) -> None:
    service, x = Service(networks, head_seconds=0.3, body_seconds=0.3), images(2)
    with listening(service) as port, contextlib.ExitStack() as stack:

        def connection() -> socket.socket:
            return stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=WAIT))

        silent, in_head, in_body, second = (connection() for _ in range(4))
        in_head.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-")
        start = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: 700\r\n\r\n"
        in_body.sendall(start.encode() + b"\x93NUMPY")
        second.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert second.recv(4096).startswith(b"HTTP/1.1 200")
        second.sendall(b"GET /health/li")  # a second request on an open connection
        same(sent(port, x), networks, x)
        assert until_closed(silent) == b""
        assert until_closed(in_head) == b""
        assert until_closed(in_body).startswith(b"HTTP/1.1 408")
        until_closed(second)
        large = connection()
        large.sendall(start.replace("700", "70000000").encode())
        assert until_closed(large).startswith(b"HTTP/1.1 413")
        # What goes on for longer than that, but is no slow client, is left alone.
        with held(networks[0]) as go:
            threading.Timer(0.6, go.set).start()
            same(
                httpx.post(f"http://127.0.0.1:{port}/predict", content=body(x), headers=HEADERS, timeout=WAIT),
                networks,
                x,
            )


def header_of(shape: str, descr: str = "'<f4'", order: str = "False") -> bytes:
    """An array's header with anything for its shape, and 256 bytes of zeros."""
    head = f"{{'descr':{descr},'fortran_order':{order},'shape':{shape}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(256)


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            header_of(s)
            for s in ("(True,True,8,8)", "(1,True,8,8)", "(-1,1,8,8)", "(1,1,-8,-8)", "(1.0,1,8,8)", "1", "")
        ),
        *(header_of(s) for s in ("(1e99,1,8,8)", "(None,1,8,8)", "[1,1,8,8]", "('1',1,8,8)", "(" * 90, "(0,1,8,8)")),
        header_of(f"({10**30},1,8,8)"),
        header_of(f"({10**200},)"),
        *(header_of("(1,1,8,8)", d) for d in ("'|O'", "'O'", "'<f8'", "'<c16'", "[('a','<f4')]", "None", "'<M8[s]'")),
        header_of("(1,1,8,8)", order="True"),
        header_of("(1,1,8,8)", order="1"),
        header_of("(1,1,8,8)")[:-1],
        header_of("(1,1,8,8)") + b"x",
        header_of("(1,1,8,8)")[:12],
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(64),
        b"\x93NUMPY\x09\x00" + bytes(64),
        body(torch.full((1, 1, 8, 8), float("nan"))),
        body(torch.full((1, 1, 8, 8), -float("inf"))),
        b"",
        b"PK\x03\x04" + bytes(99),
    ],
)
def test_bodies_that_are_no_array_for_the_model_are_refused_with_4xx(wrong: bytes) -> None:
    with pytest.raises(Refused) as refused:
        Expected((1, 8, 8), np.dtype("float32"), 8).read(wrong)
    assert 400 <= refused.value.status < 500 and "\n" not in str(refused.value)


def test_whoever_sends_too_much_in_one_go_reads_the_answer(networks: list[Network]) -> None:
    service = Service(networks)
    with listening(service) as port:
        for headers in (HEADERS, {"content-type": "text/plain"}):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT)
            connection.request("POST", "/predict", bytes(12 * service.limits.body_bytes), headers)
            answer = connection.getresponse()
            assert answer.status == (413 if headers is HEADERS else 415)
            assert json.loads(answer.read())["error"]
            connection.close()


def test_idle_and_busy_clients_leave_the_health_check_alone(networks: list[Network]) -> None:
    service, x = Service(networks, connections=4, head_seconds=20.0, queue=64), images(1)
    with listening(service) as port, contextlib.ExitStack() as stack:

        def live() -> int:
            return httpx.get(f"http://127.0.0.1:{port}/health/live", timeout=WAIT, trust_env=False).status_code

        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=WAIT)) for _ in range(9)]
        assert live() == 200
        same(sent(port, x), networks, x)
        assert until_closed(idle[0]) == b""  # the oldest made room
        answers: list[httpx.Response] = []
        with held(networks[0]) as go:
            clients = [threading.Thread(target=lambda: answers.append(sent(port, x))) for _ in range(4)]
            for client in clients:
                client.start()
            waited = time.monotonic()
            while service.engine._examples < 4:
                assert time.monotonic() - waited < WAIT
                time.sleep(0.01)
            assert live() == 200
            assert sent(port, x).status_code == 503
            assert live() == 200
            go.set()
            for client in clients:
                client.join(WAIT)
        assert [a.status_code for a in answers] == [200] * 4


def test_unknown_paths_methods_and_parameters_get_one_line(networks: list[Network]) -> None:
    async def run() -> None:
        async with Service(networks).client() as client:
            for answer, status in (
                (await client.get("/nothing"), 404),
                (await client.delete("/predict"), 405),
                (await client.get("/history", params={"after": "yesterday"}), 422),
            ):
                assert answer.status_code == status and isinstance(answer.json()["error"], str)

    asyncio.run(run())


def test_a_service_that_is_stopped_answers_what_it_let_in(networks: list[Network]) -> None:
    service, x, answers = Service(networks), images(1), []

    def request() -> None:
        answers.append(sent(port, x))

    with held(networks[0]) as go:
        clients = [threading.Thread(target=request) for _ in range(3)]
        with listening(service) as port:
            for client in clients:
                client.start()
            waited = time.monotonic()
            while service.engine._examples < 3:
                assert time.monotonic() - waited < WAIT
                time.sleep(0.01)
            threading.Timer(0.3, go.set).start()  # after it was told to stop
    for client in clients:
        client.join(WAIT)
    assert [same(a, networks, x) for a in answers] == ["dense"] * 3
    assert not service.engine.ready
    assert not service.engine.alive


@pytest.mark.slow
def test_the_command_serves_a_bundle_until_it_is_told_to_stop(net: cocktail.CocktailNet, tmp_path: Path) -> None:
    net.save_pretrained(tmp_path / "bundle")
    (tmp_path / "tiny_digits.py").write_text(
        "from cocktailsdk.presets.models import DigitsNet\n\ndef model():\n    return DigitsNet((8, 16, 32))\n"
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        sys.executable,
        str(SERVE),
        str(tmp_path / "bundle"),
        "--model",
        "tiny_digits:model",
        "--port",
        str(port),
    ]
    process = subprocess.Popen(
        [*command, "--only", "dense", "--only", "channel@0.51"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    try:
        waited = time.monotonic()
        while True:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() - waited < 300
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health/ready", trust_env=False).status_code == 200:
                    break
            time.sleep(0.1)
        x = images(2)
        answer = sent(port, x).json()
        assert answer["network"] == "dense"
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(answer["outputs"]), net(x), rtol=1e-4, atol=1e-4)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=WAIT)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (0, -signal.SIGTERM)  # uvicorn raises the signal again once all is done
    assert "Application shutdown complete" in errors


def test_what_cannot_be_served_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("serve", SERVE)
    assert spec is not None and spec.loader is not None
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    with pytest.raises(SystemExit):
        serve.parse(["bundle", "--batch", "0"])
    assert "--batch must be above 0" in capsys.readouterr().err
    with pytest.raises(ValueError, match="queue=0"):
        Limits(queue=0)
