"""The middle of a stream, in both forms of its source: compiled and not, they do the same."""

import importlib.util
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest

from block.gateway.wire import relay
from gateway.fakes import chunk, event


def uncompiled() -> ModuleType:
    """The source itself, whatever is installed."""
    path = Path(relay.__file__).with_name("relay.py")
    spec = importlib.util.spec_from_file_location("uncompiled_relay", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FORMS = {"installed": relay, "uncompiled": uncompiled()}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Any:
    return FORMS[request.param]


@pytest.mark.parametrize(
    "data",
    [b"0\r\n\r\n", b"0x2\r\n{}\r\n", b"02\r\n{}\r\n", b"+2\r\n{}\r\n", b"3\r\n{}\r\n", b"2\r\n{}\r\n0\r\n\r\n", b"2;a\r\n{}\r\n",
     b"2\r\n{}", b"A\r\n0123456789\r\n", b"", b"\r\n", b"2", b"2\r", b"2\r\n", b"2\n{}\r\n", b"2\r\n{}\n\n", b"2\r\n{}\r\r",
     b"ffffffffff\r\n{}\r\n", b"00000000\r\n\r\n", b"2 \r\n{}\r\n"],
)  # fmt: skip
def test_only_a_plainly_written_whole_chunk_takes_the_short_way(form: Any, data: bytes) -> None:
    assert not form.is_one_chunk(data)


def test_every_size_takes_the_short_way_and_no_other_size_does(form: Any) -> None:
    for size in [*range(1, 600), 4095, 4096, 70_000, 1 << 20]:
        whole = chunk(b"x" * size)
        assert form.is_one_chunk(whole)
        assert not form.is_one_chunk(whole[:-1])
        assert not form.is_one_chunk(whole + b"\n")


class Client:
    """Takes what is written; a relay, an inlet and an instance around it, of one form."""

    def __init__(self, form: Any) -> None:
        self.got: list[bytes] = []
        self.looked_at: list[bytes] = []
        client = self

        class Exchange(form.Relay):
            __slots__ = ()

            def body_received(self, data: bytes) -> None:
                client.looked_at.append(data)

        class Upstream(form.Inlet):
            def received(self, data: bytes) -> None:
                client.looked_at.append(b"framing: " + data)

        self.relay, self.inlet, self.instance = Exchange(self.got.append), Upstream(), form.Heard()
        self.relay.source = self.instance

    def state(self) -> tuple[Any, ...]:
        relay = self.relay
        heard = relay.heard_s > 0, relay.heard_s == self.instance.last_byte_s
        return self.got, self.looked_at, relay.events, relay.before_last, relay.last, relay.plain, heard


@pytest.mark.parametrize("seed", range(20))
def test_both_forms_pass_the_same_bytes_on_and_note_the_same(seed: int) -> None:
    chance = Random(seed)
    clients = [Client(form) for form in FORMS.values()]
    for _ in range(100):
        data = chunk(b"".join(event("data: x") for _ in range(chance.randint(0, 3))) or b":")
        if chance.random() < 0.2:
            data = data[: chance.randint(0, len(data))] + bytes(chance.choices(b"0123abf\r\n", k=chance.randint(0, 3)))
        plain, between = chance.random() < 0.8, chance.random() < 0.9
        for client in clients:
            client.relay.plain = plain
            client.inlet.relay = client.relay if between else None
            client.inlet.data_received(data)
        assert clients[0].state() == clients[1].state()
    got, looked_at, events, before_last, last, *_ = clients[0].state()
    assert len(got) > 20
    assert len(looked_at) > 20
    assert events == sum(data.count(b"data:") for data in got)
    assert [before_last, last] == got[-2:]
