"""What stands before the fleet: how each router is started, with its own defaults but for the addresses."""

import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from fleet import Member
from rig import free_ports, process


class Running(NamedTuple):
    url: str
    pids: list[int]


Start = Callable[[ExitStack, list[Member]], Running]


def block(*options: str, predictors: bool = True) -> Start:
    def start(stack: ExitStack, fleet: list[Member]) -> Running:
        url, pid = _block(stack, fleet, options, predictors=predictors)
        return Running(url, [pid])

    return start


def _block(stack: ExitStack, fleet: list[Member], options: tuple[str, ...], *, predictors: bool) -> tuple[str, int]:
    (port,) = free_ports(1)
    instances = [
        f"--instance={m.url},name={m.name}" + (f",predictor={m.predictor_url}" if predictors else "") for m in fleet
    ]
    command = [sys.executable, "-c", "from block.cli import main; main()", "serve", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    return url, stack.enter_context(
        process(*command, "--log-level", "error", *options, *instances, ready=url + "/ready")
    )


def rust_router(path: str, *words: str) -> Start:
    """vllm-router, or sglang-router (``launch`` comes first): the same flags."""

    def start(stack: ExitStack, fleet: list[Member]) -> Running:
        port, metrics = free_ports(2)
        url = f"http://127.0.0.1:{port}"
        command = [path, *words, "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)]
        pid = stack.enter_context(process(*command, "--worker-urls", *[m.url for m in fleet], ready=url + "/health"))
        return Running(url, [pid])

    return start


HAPROXY = """
defaults
  mode http
  timeout connect 2s
  timeout client 60s
  timeout server 60s
  option http-no-delay
  option redispatch
  retries 3
frontend in
  bind 127.0.0.1:{port}
  default_backend out
backend out
  balance leastconn
  retry-on all-retryable-errors
  option httpchk GET /health
  default-server check inter 1s fall 3 rise 2
{servers}
"""


def haproxy(path: str) -> Start:
    def start(stack: ExitStack, fleet: list[Member]) -> Running:
        servers = "\n".join(f"  server {m.name} 127.0.0.1:{m.port}" for m in fleet)
        return Running(*_haproxy(stack, path, HAPROXY, servers, "/v1/models"))

    return start


BALANCER = """
defaults
  mode tcp
  timeout connect 1s
  timeout client 60s
  timeout server 60s
  option redispatch 1
  retries 3
listen in
  bind 127.0.0.1:{port}
  balance roundrobin
  option httpchk GET /ready
  default-server check inter 500ms fall 2 rise 1 on-marked-down shutdown-sessions
{servers}
"""


def two_gateways(path: str, *options: str) -> Start:
    """Two ``block serve`` behind HAProxy in TCP mode; the first pid is the one to kill."""

    def start(stack: ExitStack, fleet: list[Member]) -> Running:
        gateways = [_block(stack, fleet, options, predictors=True) for _ in range(2)]
        servers = "\n".join(f"  server g{n} {url.removeprefix('http://')}" for n, (url, _) in enumerate(gateways))
        url, _ = _haproxy(stack, path, BALANCER, servers, "/health")
        return Running(url, [pid for _, pid in gateways])

    return start


def _haproxy(stack: ExitStack, path: str, template: str, servers: str, ready: str) -> tuple[str, list[int]]:
    (port,) = free_ports(1)
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "haproxy.cfg"
    file.write_text(template.format(port=port, servers=servers))
    url = f"http://127.0.0.1:{port}"
    return url, [stack.enter_context(process(path, "-db", "-f", str(file), ready=url + ready))]


def found(options: object) -> dict[str, Start]:
    """Those that are installed, by name."""
    routers: dict[str, Start] = {
        "block serve": block("--policy", "block", "--continue-streams", "3"),
        "block serve, round-robin": block("--policy", "round-robin", predictors=False),
    }
    vllm, sglang = (
        getattr(options, name) or shutil.which(name.replace("_", "-")) for name in ("vllm_router", "sglang_router")
    )
    if vllm:
        routers["vllm-router, power_of_two"] = rust_router(vllm, "--policy", "power_of_two")
    if sglang:
        routers["sglang-router, power_of_two"] = rust_router(sglang, "launch", "--policy", "power_of_two")
    if path := haproxy_path():
        routers["HAProxy, leastconn"] = haproxy(path)
    return routers


def haproxy_path() -> str | None:
    """Where it is; it is not on everybody's PATH."""
    return shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
