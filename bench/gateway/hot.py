"""The data plane without sockets: bytes of a stream in at one end, out at the other, on transports that do nothing.

    python bench/gateway/hot.py [--events 100] [--streams 24] [--rounds 9] [--megabytes 4] [--policy round-robin] [--profile]

What compare.py measures with the kernel in it, this measures without: a relayed SSE event and all the rest of a stream (head,
decision, accounts), in turns with the least that a proxy can do (llhttp and one write an event). Before each call --megabytes of
memory are copied, since between two events of a paced stream others use the caches; 0: everything is where it was. Medians,
which a busy machine hardly moves.
"""

import argparse
import asyncio
import cProfile
import json
import pstats
import statistics
import time
from typing import Any

import httptools
from backend import MODEL, STREAM_END, STREAM_HEAD, chat_event

from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.members.pool import State
from block.gateway.serve import Gateway
from block.gateway.wire.proxy import ClientConnection
from block.gateway.wire.upstream import UpstreamConnection

PROMPT = {"model": MODEL, "messages": [{"role": "user", "content": "x" * 200}], "max_tokens": 128, "stream": True}
BODY = json.dumps(PROMPT, separators=(",", ":")).encode()
REQUEST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
)
SETTLED_EVERY = 8
EVENT = chat_event({"content": " tok"})


class Nowhere(asyncio.Transport):
    """Takes everything, does nothing."""

    written = 0

    def write(self, data: Any) -> None:
        self.written += len(data)

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None: ...

    def close(self) -> None: ...


class Cold:
    """What happens between two events of a paced stream: others use the CPU's caches."""

    def __init__(self, megabytes: float) -> None:
        size = int(megabytes * (1 << 20))
        self._from, self._to = bytes(size), bytearray(size)

    def __call__(self) -> None:
        if self._from:
            self._to[:] = self._from


class Floor:
    """llhttp and one write an event."""

    def __init__(self) -> None:
        self.transport = Nowhere()

    def begin(self) -> None:
        self.parser, self.whole = httptools.HttpResponseParser(self), False

    def on_message_complete(self) -> None:
        self.whole = True

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)
        self.transport.write(data)
        if self.whole:
            pass


class Ours:
    """One client's connection and one to an instance, in a gateway that is otherwise whole."""

    def __init__(self, gateway: Gateway) -> None:
        self.client = ClientConnection(gateway.app)
        self.client.connection_made(Nowhere())
        self.connections = next(iter(gateway.pool.instances.values())).connections
        self.upstream = UpstreamConnection(self.connections)
        self.upstream.connection_made(Nowhere())
        self.connections.give_back(self.upstream)
        self.data_received = self.upstream.data_received
        self._books, self._begun = gateway.dispatcher.books, 0

    def begin(self) -> None:
        self._begun += 1
        if self._begun % SETTLED_EVERY == 0:  # as a sweep does
            self._books.settle()
        self.client.data_received(REQUEST % len(BODY) + BODY)


def play(one: Floor | Ours, streams: int, events: int, cold: Cold) -> tuple[float, float]:
    """Seconds of an event in the middle of streams, and of the rest of a stream; medians, with cold caches each time."""
    clock, events_s, rest_s = time.perf_counter, [], []
    parts = [
        (one.data_received, STREAM_HEAD + EVENT),
        *[(one.data_received, bytes(EVENT))] * events,
        (one.data_received, STREAM_END),
    ]
    for _ in range(streams):
        cold()
        at_s = clock()
        one.begin()
        own_s = clock() - at_s
        for n, (received, data) in enumerate(parts):
            cold()
            at_s = clock()
            received(data)
            took_s = clock() - at_s
            if 2 <= n < len(parts) - 1:
                events_s.append(took_s)
            else:
                own_s += took_s
        rest_s.append(own_s)
    each_eight = [sum(rest_s[n : n + SETTLED_EVERY]) / SETTLED_EVERY for n in range(0, streams, SETTLED_EVERY)]
    return statistics.median(events_s), statistics.median(each_eight)


async def measure(options: argparse.Namespace, profiler: cProfile.Profile | None) -> None:
    config = GatewayConfig(port=0, policy=options.policy, instances=[InstanceConfig(url="http://127.0.0.1:9")])
    gateway = Gateway(config)
    await gateway.start()
    for task in gateway.members.tasks():
        task.cancel()
    (instance,) = gateway.pool.instances.values()
    gateway.pool.set_models(instance, {MODEL: b"{}"})
    instance.state = State.READY
    gateway.pool.up(instance)
    things: dict[str, Floor | Ours] = {"floor": Floor(), "block serve": Ours(gateway)}
    cold = Cold(options.megabytes)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in things}
    for turn in range(options.rounds + 1):
        for name, one in things.items():
            if profiler is not None and name != "floor":
                profiler.enable()
            times = play(one, options.streams, options.events, cold)
            if profiler is not None:
                profiler.disable()
            if turn:
                found[name].append(times)
    for name, each in found.items():
        event_us = statistics.median(a for a, _ in each) * 1e6
        rest_us = statistics.median(b for _, b in each) * 1e6
        whole_us = event_us + rest_us / options.events
        print(
            f"{name:12s} {event_us:6.2f} us an event, {rest_us:6.1f} us the rest of a stream, {whole_us:6.2f} us both, an event"
        )
    assert not gateway.dispatcher.active
    await gateway.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100)
    parser.add_argument("--streams", type=int, default=24, help="a multiple of 8")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=float, default=4.0, help="copied before each call; 0: caches stay warm")
    parser.add_argument("--policy", default="round-robin")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    profiler = cProfile.Profile() if options.profile else None
    asyncio.run(measure(options, profiler))
    if profiler is not None:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
