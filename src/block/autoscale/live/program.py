"""``block autoscale`` as a running program: puts the parts together, and takes them apart again."""

import asyncio
import hashlib
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import aiohttp

from block.autoscale.actuators.kubernetes import KubernetesSettings
from block.autoscale.actuators.local import LocalSettings
from block.autoscale.actuators.surroundings import Surroundings
from block.autoscale.actuators.table import make_actuator
from block.autoscale.controllers import controller_from
from block.autoscale.live.figures import Figures
from block.autoscale.live.gateways import Gateway
from block.autoscale.live.keeper import Keeper, Pace, Record
from block.autoscale.live.lease import LeaseLock
from block.autoscale.live.lock import FileLock, Lock, NoLock
from block.autoscale.live.membership import Membership
from block.autoscale.live.observer import Observer
from block.autoscale.live.server import Window
from block.autoscale.live.settings import AutoscaleSettings, admin_key
from block.errors import ConfigError
from block.predictor.serving import serve_until_stopped


async def run_autoscaler(
    settings: AutoscaleSettings, bound: socket.socket, on_ready: Callable[[], None], *, dry_run: bool = False,
    on_record: Callable[[Record], None] | None = None, stop: asyncio.Event | None = None,
) -> None:  # fmt: skip
    """Provision until stopped. Instances that are this process's children are stopped with it.

    Raises:
        ConfigError: the settings cannot be carried out here.
    """
    key, file, lock = _prepared(settings)
    if not dry_run and isinstance(lock, FileLock):
        await lock.held()  # a path that cannot be is said now
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        gateways = [Gateway(session, url, key, settings.gateways.timeout_s) for url in settings.gateways.urls]
        prefix = f"{settings.name}-" if isinstance(settings.actuator, LocalSettings) else None
        membership = Membership(gateways, settings.gateways.register, file, prefix)
        membership.leads = False
        kinds = {kind.name: kind for kind in settings.kinds}
        actuator = make_actuator(settings.actuator, Surroundings(settings.name, kinds, membership, session))
        figures = Figures(settings.kinds)
        keeper = Keeper(
            Observer(gateways, membership, actuator, settings.kinds, session),
            lambda kinds: controller_from(settings.controller, kinds, settings.slo, **settings.options),
            actuator, settings.kinds, settings.guarded,
            pace=Pace(interval_s=settings.interval_s, act_within_s=settings.act_within_s, unmet_after_s=settings.unmet_after_s),
            lock=lock, membership=membership, figures=figures, dry_run=dry_run, kept=settings.decisions_kept,
            on_record=on_record,
        )  # fmt: skip
        tasks = [asyncio.create_task(membership.run()), asyncio.create_task(keeper.run())]
        try:
            await serve_until_stopped(Window(keeper, figures, settings.interval_s).app(), bound, on_ready, stop)
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task
            await actuator.close()
            await keeper.close()


async def check(settings: AutoscaleSettings) -> None:
    """All that can be checked without starting.

    Raises:
        UserError: the settings cannot be carried out here.
    """
    _, _, lock = _prepared(settings)
    if isinstance(lock, FileLock):
        lock.check()
    kinds = {kind.name: kind for kind in settings.kinds}
    async with aiohttp.ClientSession() as session:
        actuator = make_actuator(settings.actuator, Surroundings(settings.name, kinds, Membership([]), session))
        await actuator.close()


def _prepared(settings: AutoscaleSettings) -> tuple[str, Path | None, Lock]:
    """The admin key, the file for the gateways, and the lock, not taken."""
    key = admin_key(settings.gateways)
    file = None if settings.gateways.file is None else Path(settings.gateways.file)
    if file is not None and (not file.absolute().parent.is_dir() or file.is_dir()):
        raise ConfigError(
            f"gateways.file = {str(file)!r} cannot be written: its folder must exist, and it must be a file."
        )
    return key, file, lock_of(settings)


def lock_of(settings: AutoscaleSettings) -> Lock:
    """The lock that decides who acts: none, a file, or, where nothing is said, the cluster's Lease or a file of the name."""
    if settings.lock == "":
        return NoLock()
    if settings.lock is not None:
        return FileLock(Path(settings.lock))
    cluster = settings.actuator
    if isinstance(cluster, KubernetesSettings):
        name = f"block-autoscale-{settings.name}"
        return LeaseLock(name, cluster.namespace, cluster.kubeconfig, cluster.context, cluster.timeout_s)
    mark = hashlib.sha256(" ".join([settings.name, *sorted(settings.gateways.urls)]).encode()).hexdigest()[:12]
    return FileLock(Path(tempfile.gettempdir()) / f"block-autoscale-{mark}.lock")
