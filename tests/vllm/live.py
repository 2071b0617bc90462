"""Start and stop real vLLM servers on this machine's CPU, with Block's plugin, for tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from block.predictor.shared_memory import snapshot_path

START_S = 240.0
STOP_S = 20.0
REPOSITORY = Path(__file__).parents[2]
BLOCK = (sys.executable, "-c", "from block.cli import main; main()")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Program:
    """One program in a process group of its own; ``stop`` ends the whole group."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **environment},
            )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def kill(self) -> None:
        """At once, all of it, as a machine that fails would; only its shared memory is tidied up afterwards."""
        mapped = self.shared_memory()
        self._signal(signal.SIGKILL)
        self._process.wait()
        for path in mapped:
            path.unlink(missing_ok=True)

    def members(self) -> list[int]:
        """The processes of its group."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            if int(fields[2]) == self._process.pid:
                found.append(int(stat.parent.name))
        return found

    def cpu_s(self, named: str = "") -> float:
        """CPU seconds so far, of its processes whose command line contains ``named``."""
        ticks = 0
        for pid in self.members():
            if named in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def shared_memory(self) -> set[Path]:
        """vLLM's own files in /dev/shm."""
        found = set()
        for pid in self.members():
            try:
                maps = Path(f"/proc/{pid}/maps").read_text()
            except OSError:  # it has just ended
                continue
            for line in maps.splitlines():
                path = Path(line.rpartition(" ")[2])
                if path.parent == Path("/dev/shm") and path.name.startswith(("psm_", "sem.mp-")):
                    found.add(path)
        return found

    def stop(self) -> None:
        mapped = self.shared_memory()
        if self.running:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
            self._wait_for_the_group()
        self._signal(signal.SIGKILL)  # also what the leader left behind
        self._process.wait()
        for path in mapped:
            path.unlink(missing_ok=True)

    def _wait_for_the_group(self) -> None:
        """vLLM's helpers remove its shared memory after their leader has gone."""
        give_up = time.monotonic() + 5
        while time.monotonic() < give_up and self._signal(0):
            time.sleep(0.05)

    def _signal(self, number: int) -> bool:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True


class VllmServer(Program):
    """``vllm serve`` on one core. ``plugin`` False starts it without Block's."""

    def __init__(
        self,
        python: Path,
        model: Path,
        log: Path,
        *,
        name: str,
        core: int = 0,
        plugin: bool = True,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.port = name, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        settings = {
            "VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core),
            "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
            "VLLM_PLUGINS": "block", "BLOCK_VLLM_CALM": "1", "BLOCK_VLLM_NAME": name,
            "BLOCK_VLLM_OFF": "0" if plugin else "1", **(environment or {}),
        }  # fmt: skip
        command = [
            str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", "tiny",
            "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "bfloat16", "--enforce-eager",
            "--block-size", "32", "--disable-uvicorn-access-log", *arguments,
        ]  # fmt: skip
        super().__init__(command, log, settings)

    def stop(self) -> None:
        super().stop()
        snapshot_path(self.name).unlink(missing_ok=True)  # vLLM kills its engine process, which could not

    def wait(self) -> None:
        """Until it answers.

        Raises:
            RuntimeError: it ended, or took longer than ``START_S``.
        """
        wait_healthy(self, self.url)


def wait_healthy(program: Program, url: str, path: str = "/health", within_s: float = START_S) -> None:
    """Until ``url`` answers 200.

    Raises:
        RuntimeError: the program ended, or did not answer in time.
    """
    give_up = time.monotonic() + within_s
    while time.monotonic() < give_up:
        if not program.running:
            raise RuntimeError(f"{program.log.name}: the program ended:\n{program.tail()}")
        try:
            with urllib.request.urlopen(url + path, timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"{program.log.name}: no answer within {within_s:.0f} s:\n{program.tail()}")


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":  # live.py PYTHON MODEL [ARGUMENT ...]: one server until interrupted
    signal.signal(signal.SIGTERM, _interrupt)
    server = VllmServer(
        Path(sys.argv[1]), Path(sys.argv[2]), Path("/tmp/vllm-live.log"), name="live", arguments=sys.argv[3:]
    )
    try:
        server.wait()
        sys.stdout.write(server.url + "\n")
        sys.stdout.flush()
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        server.stop()
