"""``block emulate`` as a running program: socket, engine, timer, server, and their end."""

import asyncio
import socket
from collections.abc import Callable

from block.emulate.config import EmulateConfig
from block.emulate.instance import Instance
from block.emulate.server import make_app
from block.emulate.timer import best_timer
from block.predictor.serving import serve_until_stopped


async def emulate(
    config: EmulateConfig, bound: socket.socket, on_ready: Callable[[], None], stop: asyncio.Event | None = None
) -> None:
    """Serve an emulated engine on a bound socket until stopped. The port refuses connections during the cold start.

    Raises:
        UserError: the profile, a setting or the name in shared memory is wrong.
    """
    instance = Instance(config)
    player, publisher = instance.player, instance.publisher
    timer = best_timer(asyncio.get_running_loop(), player.play, instance.clock.now_s)
    player.use_timer(timer)
    beat = None
    try:
        await asyncio.sleep(config.startup_s)
        if publisher is not None:
            publisher.publish()
            beat = asyncio.create_task(publisher.beat())
        await serve_until_stopped(make_app(instance), bound, on_ready, stop)
    finally:
        if beat is not None:
            beat.cancel()
        timer.close()
        if publisher is not None:
            publisher.close()
