"""Settings, the command line, the autoscaler's own HTTP, the operator's command, membership by file."""

# ruff: noqa: ASYNC110  (what is waited for happens in another process)

import asyncio
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from autoscale_live.fakes import KEY, FakeGateway
from block.autoscale.actuators.command import ExecActuator, ExecSettings
from block.autoscale.live.keeper import Record
from block.autoscale.live.membership import Membership
from block.autoscale.live.program import lock_of, run_autoscaler
from block.autoscale.live.settings import AutoscaleSettings, load_settings, settings_from
from block.autoscale.terms import Member, Phase
from block.errors import ActuatorError, BadInputError, ConfigError, UnknownNameError
from block.gateway.config import GatewayConfig, InstanceConfig
from block.gateway.members.discovery.file import read_instances
from block.predictor.serving import bind, url_of
from block.predictor.serving import run as run_program

GOOD: dict[str, Any] = {
    "controller": "static:count=2", "interval_s": 0.1, "gateways": {"urls": ["http://127.0.0.1:9"], "admin_key": KEY},
    "actuator": {"type": "metric"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": []}, r"Unknown at the top: kind \(known: name, controller"),
        ({"gateways": {"url": "x"}}, r"Unknown in gateways: url \(known: urls, admin_key"),
        ({"actuator": {"type": "local", "comand": []}}, r"Unknown in actuator: comand \(known: command"),
        ({"actuator": {"type": "local", "kinds": {"default": {"flag": []}}}}, "flag"),
        ({"actuator": {"type": "exec"}}, "missing required field `command`"),
        ({"actuator": {}}, r"\[actuator\] needs a type: local, kubernetes, ray, exec, metric"),
        ({"gateways": {}}, "gateways.urls must name the gateways"),
        ({"gateways": {"urls": ["ftp://a"]}}, "gateway URL"),
        ({"gateways": {"urls": ["http://a"], "register": "file"}}, "gateways.file goes with"),
        ({"guard": {"lest": 1}}, r"Unknown in guard: lest \(known: least, most"),
        ({"guard": {"least": 9, "most": 2}}, "least must be 0 to most"),
        ({"controller": "static:cuont=1"}, "has no option cuont"),
        ({"kinds": [{"name": "a"}, {"name": "a"}]}, "no two of one name"),
        ({"kinds": [{"name": "a", "least": 3, "most": 2}]}, "needs 0 <= least <= most"),
        ({"kinds": [{"name": "a", "price": 0}]}, "needs a price above 0"),
        ({"kinds": [{"name": "a", "cold_start_s": -1}]}, "needs a price above 0 and a cold_start_s of at least 0"),
        ({"slo": {"ttft_s": -1}}, "slo.ttft_s must be above 0"),
        ({"guard": {"least": 9}, "kinds": [{"most": 4}]}, "guard.least is 9, but all kinds together have at most 4"),
        ({"interval_s": 0}, "interval_s must be above 0"),
        ({"name": "a b"}, "name must be letters"),
        ({"interval_s": float("inf")}, "interval_s must be above 0 and finite"),
        ({"port": 70_000}, "port must be 0 to 65535"),
        ({"decisions_kept": 0}, "decisions_kept must be at least 1"),
        ({"guard": {"settle_s": float("nan")}}, "must be finite"),
        ({"kinds": [{"name": ""}]}, "each with a name"),
        ({"kinds": [{"name": "a", "cold_start_s": float("inf")}]}, "both finite"),
        ({"actuator": {"type": "exec", "command": [""]}}, "must name a program"),
        ({"actuator": {"type": "exec", "command": ["a"], "timeout_s": float("inf")}}, "above 0 and finite"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_mistake_in_the_settings_is_one_sentence(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings_from(GOOD | change, "autoscale.toml")


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(
        UnknownNameError, match=r"no actuator named 'docker'\. Known: exec, kubernetes, local, metric, ray"
    ):
        settings_from(GOOD | {"actuator": {"type": "docker"}}, "autoscale.toml")
    with pytest.raises(UnknownNameError, match="no controller named 'magic'"):
        settings_from(GOOD | {"controller": "magic"}, "autoscale.toml")


def test_single_values_change_the_guard_that_suits_the_controller() -> None:
    settings = settings_from(GOOD | {"controller": "hpa-queue", "guard": {"most": 5}}, "autoscale.toml")
    assert (settings.guarded.most, settings.guarded.settle_s) == (5, 300.0)


def test_a_file_that_is_not_there_or_no_toml_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="There is no file"):
        load_settings(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(BadInputError, match="is not TOML"):
        load_settings(tmp_path / "bad.toml")
    with pytest.raises(BadInputError, match="cannot be read: Is a directory"):
        load_settings(tmp_path)


def test_one_name_and_gateways_make_one_lock(tmp_path: Path) -> None:
    settings = settings_from(GOOD, "a")
    assert lock_of(settings)._path == lock_of(settings_from(GOOD | {"interval_s": 9.0}, "a"))._path  # type: ignore[attr-defined]
    assert lock_of(settings_from(GOOD | {"name": "other"}, "a"))._path != lock_of(settings)._path  # type: ignore[attr-defined]


async def test_decisions_metrics_health_and_what_is_wanted_are_served(gateways: Any, tmp_path: Path) -> None:
    (fake,) = await gateways()
    settings = settings_from(
        GOOD | {"gateways": {"urls": [fake.url], "admin_key": KEY}, "lock": str(tmp_path / "lock")}, "a"
    )
    stop, heard = asyncio.Event(), list[Record]()
    with bind("127.0.0.1", 0) as bound:
        url = url_of(bound)
        running = asyncio.create_task(run_autoscaler(settings, bound, lambda: None, on_record=heard.append, stop=stop))
        async with asyncio.timeout(20), aiohttp.ClientSession() as session:
            while len(heard) < 2:
                await asyncio.sleep(0.02)

            async def get(path: str) -> tuple[int, Any]:
                async with session.get(url + path) as answer:
                    return answer.status, (await answer.text()) if path == "/metrics" else await answer.json()

            assert await get("/desired") == (200, {"want": {"default": 2}, "total": 2})
            status, told = await get("/decisions?limit=1")
            assert (status, len(told["data"]), told["data"][0]["want"]) == (200, 1, {"default": 2})
            assert (await get("/decisions?limit=no"))[0] == 400
            assert (await get("/health"))[1]["status"] == "ok"
            assert 'block_desired_instances{kind="default"} 2.0' in (await get("/metrics"))[1]
        stop.set()
        await running
    assert not fake.calls.count("POST /admin/instances"), "there is nothing to join"


def test_the_documentation_names_every_metric_of_the_autoscaler() -> None:
    from block.autoscale.live.figures import Figures

    text = (Path(__file__).parents[2] / "docs" / "autoscale-live.md").read_text()
    for family in Figures([]).registry.collect():
        assert family.name in text, family.name


def test_the_alerts_and_the_examples_for_other_scalers_name_metrics_that_are_exported() -> None:
    from block.autoscale.live.figures import Figures

    deploy = Path(__file__).parents[2] / "deploy"
    exported = {f.name + s for f in Figures([]).registry.collect() for s in ("", "_total", "_bucket", "_count", "_sum")}
    for file in ("autoscale-alerts.yaml", "kubernetes/keda.yaml", "kubernetes/hpa.yaml"):
        named = set(re.findall(r"\bblock_[a-z_]+", (deploy / file).read_text()))
        assert named
        assert named <= exported, named - exported


def test_the_documentation_names_every_setting() -> None:
    from block.autoscale.actuators.table import ACTUATORS

    text = (Path(__file__).parents[2] / "docs" / "autoscale-live.md").read_text()
    for record in (AutoscaleSettings, *(settings for settings, _ in ACTUATORS.values())):
        for field in record.__struct_fields__:
            assert f"`{field}`" in text, f"{record.__name__}.{field}"


# The command line


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "block", "autoscale", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_configuration_is_checked_without_running(tmp_path: Path) -> None:
    file = tmp_path / "autoscale.toml"
    file.write_text(
        'controller = "static"\n[gateways]\nurls = ["http://127.0.0.1:9"]\nadmin_key = "k"\n[actuator]\ntype = "local"\n'
    )
    done = run(str(file), "--check-config")
    assert done.stdout == "The configuration is fine: static over default, actuator local.\n"
    file.write_text('[actuator]\ntype = "local"\nport = 1\n')
    done = run(str(file))
    assert done.returncode == 2
    assert "Unknown in actuator: port" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("[gateways]", "admin key is missing"),
        ('[gateways]\nadmin_key = "a\\nb"', "one line"),
        ('[gateways]\nadmin_key_file = "TMP/empty"', "is empty"),
        ('lock = "TMP/none/lock"\n[gateways]\nadmin_key = "k"', "The lock file"),
        ('[gateways]\nadmin_key = "k"\nregister = "file"\nfile = "TMP/none/a.toml"', "its folder must exist"),
        ('[actuator.kinds]\na = {}\n[gateways]\nadmin_key = "k"', "actuator.kinds.a: there is no such kind"),
        ('[[kinds]]\nprofile = "none"\n[gateways]\nadmin_key = "k"', "no profile named 'none'"),
    ],
)
def test_what_would_fail_at_the_start_is_said_by_the_check(
    given: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BLOCK_ADMIN_KEY", raising=False)
    (tmp_path / "empty").touch()
    file = tmp_path / "autoscale.toml"
    given = given.replace("TMP", str(tmp_path))
    file.write_text(f'controller = "static"\n{given}\nurls = ["http://127.0.0.1:9"]\n[actuator]\ntype = "local"\n')
    done = run(str(file), "--check-config")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr


def test_another_controller_on_the_command_line_leaves_the_options_of_the_configured_one(tmp_path: Path) -> None:
    file = tmp_path / "autoscale.toml"
    file.write_text(
        'controller = "replay"\noptions = { target = 0.99 }\n[gateways]\nurls = ["http://127.0.0.1:9"]\nadmin_key = "k"\n'
        '[actuator]\ntype = "metric"\n'
    )
    done = run(str(file), "--check-config", "--controller", "relief:threshold_s=5")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("lock", "gateways", "words"),
    [
        ("none/lock", "", "The lock file"),
        ("lock", 'register = "file"\nfile = "TMP/none/a.toml"\n', "its folder must exist"),
    ],
)
def test_a_file_that_cannot_be_is_said_at_the_start(lock: str, gateways: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "autoscale.toml"
    gateways = gateways.replace("TMP", str(tmp_path))
    file.write_text(
        f'lock = "{tmp_path}/{lock}"\n[gateways]\nurls = ["http://127.0.0.1:9"]\nadmin_key = "k"\n{gateways}'
        '[actuator]\ntype = "metric"\n'
    )
    done = run(str(file), "--port", "0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert words in done.stderr


def test_it_goes_on_when_nobody_reads_its_decisions_any_more(tmp_path: Path) -> None:
    file = tmp_path / "autoscale.toml"
    file.write_text(
        f'interval_s = 0.1\nport = 0\nlock = "{tmp_path}/lock"\n[gateways]\nurls = ["http://127.0.0.1:9"]\nadmin_key = "k"\n'
        '[actuator]\ntype = "metric"\n'
    )
    command = [sys.executable, "-m", "block", "autoscale", str(file), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "url" in process.stdout.readline()
        process.stdout.close()
        lines: list[str] = []
        while "could not be written" not in (lines or [""])[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "it goes on"
        process.terminate()
        rest = process.stderr.read()
        assert process.wait(timeout=30) == 0
    assert "Traceback" not in "".join(lines) + rest


# The operator's own command

SCRIPT = """
import json, os, sys
told = {name: value for name, value in os.environ.items() if name.startswith("BLOCK_WANT")}
with open(sys.argv[1], "a") as file:
    file.write(json.dumps([json.load(sys.stdin), told]) + "\\n")
"""


async def test_the_operators_command_is_told_the_counts_once_for_each_order(tmp_path: Path) -> None:
    told = tmp_path / "told"
    actuator = ExecActuator(ExecSettings(command=[sys.executable, "-c", SCRIPT, str(told)]), None)  # type: ignore[arg-type]
    await actuator.scale_to({"gpu-a": 2, "cpu": 0})
    await actuator.scale_to({"gpu-a": 2, "cpu": 0})
    await actuator.scale_to({"gpu-a": 1, "cpu": 0})
    first, second = [json.loads(line) for line in told.read_text().splitlines()]
    assert first[0] == {"want": {"gpu-a": 2, "cpu": 0}, "total": 2}
    assert (first[1]["BLOCK_WANT_GPU_A"], first[1]["BLOCK_WANT_TOTAL"]) == ("2", "2")
    assert second[0]["total"] == 1


async def test_a_command_that_fails_or_is_too_slow_is_an_error_and_ends() -> None:
    failing = ExecActuator(ExecSettings(command=[sys.executable, "-c", "raise SystemExit('no quota')"]), None)  # type: ignore[arg-type]
    with pytest.raises(ActuatorError, match="ended with code 1: no quota"):
        await failing.scale_to({"gpu": 1})
    slow = ExecActuator(
        ExecSettings(command=[sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.2), None
    )  # type: ignore[arg-type]
    async with asyncio.timeout(10):
        with pytest.raises(ActuatorError, match=r"took longer than 0.2 s"):
            await slow.scale_to({"gpu": 1})


def test_a_command_that_does_not_listen_has_done_its_work(tmp_path: Path) -> None:
    async def often() -> None:
        for count in range(20):
            await ExecActuator(ExecSettings(command=["true"]), None).scale_to({"gpu": count})  # type: ignore[arg-type]

    run_program(often())  # on the loop of the program: uvloop tells of a pipe that is closed already in its own way


async def test_a_command_may_say_what_members_there_are() -> None:
    members = [{"id": "a", "kind": "gpu", "phase": "ready", "since_s": 1.0}]
    command = [sys.executable, "-c", f"print({json.dumps(members)!r})"]
    told = ExecActuator(ExecSettings(command=["true"], members=command), None)  # type: ignore[arg-type]
    assert await told.members() == [Member("a", "gpu", Phase.READY, 1.0)]
    wrong = ExecActuator(ExecSettings(command=["true"], members=["echo", "nothing"]), None)  # type: ignore[arg-type]
    with pytest.raises(ActuatorError, match="did not print a list of members"):
        await wrong.members()


# Membership


async def test_a_gateway_that_starts_anew_learns_of_all_instances_again(session: Any, gateways: Any) -> None:
    (fake,) = await gateways()
    membership = Membership([fake.gateway(session)])
    membership.welcome(InstanceConfig(url="http://127.0.0.1:1", name="a"))
    await membership.beat()
    await fake.stop()
    await membership.beat()
    fake.instances.clear()
    await fake.start()
    await membership.beat()
    assert list(fake.instances) == ["a"]


async def test_an_instance_is_empty_only_when_every_gateway_says_so(session: Any, gateways: Any) -> None:
    fakes: list[FakeGateway] = await gateways(2)
    membership = Membership([fake.gateway(session) for fake in fakes])
    membership.welcome(InstanceConfig(url="http://127.0.0.1:1", name="a"))
    await membership.beat()
    await membership.beat()
    await fakes[1].stop()
    retiring = asyncio.create_task(membership.retire("a", 20.0))
    for _ in range(4):
        await asyncio.sleep(0)
        await membership.beat()
    assert not retiring.done(), "one gateway cannot be asked"
    await fakes[1].start()
    for _ in range(4):
        await asyncio.sleep(0)
        await membership.beat()
    assert await asyncio.wait_for(retiring, 2.0)
    membership.forget("a")
    await membership.beat()
    assert not fakes[0].instances
    assert not fakes[1].instances


async def test_an_instance_that_a_gateway_found_under_another_name_is_drained_there(
    session: Any, gateways: Any
) -> None:
    (fake,) = await gateways()
    fake.seat("10.0.0.7:8000", in_flight=1, url="http://10.0.0.7:8000")
    membership = Membership([fake.gateway(session)], "none")
    membership.welcome(InstanceConfig(url="http://10.0.0.7:8000", name="pod-a"))
    await membership.beat()
    assert membership.in_flight("pod-a") == 1
    retiring = asyncio.create_task(membership.retire("pod-a", 20.0))
    await asyncio.sleep(0)
    await membership.beat()
    assert fake.instances["10.0.0.7:8000"]["state"] == "draining"
    assert not retiring.done()
    retiring.cancel()


async def test_draining_ends_at_its_deadline(session: Any, gateways: Any) -> None:
    (fake,) = await gateways()
    fake.seat("a", in_flight=4)
    membership = Membership([fake.gateway(session)])
    assert not await membership.retire("a", 0.1)


async def test_a_wrong_admin_key_is_said(session: Any, gateways: Any, caplog: Any) -> None:
    (fake,) = await gateways()
    membership = Membership([fake.gateway(session)])
    await membership.beat()
    membership.gateways = [fake.gateway(session, "wrong")]
    with caplog.at_level("WARNING"):
        await membership.beat()
    assert "it refuses the admin key" in caplog.text


async def test_members_can_be_told_by_a_file_that_the_gateways_watch(
    session: Any, gateways: Any, tmp_path: Path
) -> None:
    (fake,) = await gateways()
    file = tmp_path / "instances.toml"
    membership = Membership([fake.gateway(session)], "file", file)
    membership.welcome(InstanceConfig(url="http://127.0.0.1:1", predictor="http://127.0.0.1:2", name="a"))
    await membership.beat()
    (told,) = tomllib.loads(file.read_text())["instances"]
    assert told == {"url": "http://127.0.0.1:1", "predictor": "http://127.0.0.1:2", "name": "a"}
    assert [one.id for one in read_instances(str(file), GatewayConfig())] == ["a"]
    membership.forget("a")
    await membership.beat()
    assert read_instances(str(file), GatewayConfig()) == []
    assert not fake.instances


async def test_a_file_that_cannot_be_written_is_said_once_and_tried_again(
    session: Any, gateways: Any, tmp_path: Path, caplog: Any
) -> None:
    (fake,) = await gateways()
    file = tmp_path / "folder" / "instances.toml"
    membership = Membership([fake.gateway(session)], "file", file)
    membership.welcome(InstanceConfig(url="http://127.0.0.1:1", name="a"))
    for _ in range(3):
        await membership.beat()
    assert caplog.text.count("cannot be written: No such file or directory") == 1
    file.parent.mkdir()
    await membership.beat()
    assert [one.id for one in read_instances(str(file), GatewayConfig())] == ["a"]


async def test_a_gateway_that_never_answered_is_said_once(session: Any, gateways: Any, caplog: Any) -> None:
    there, gone = await gateways(2)
    await gone.stop()
    membership = Membership([there.gateway(session), gone.gateway(session)])
    for _ in range(3):
        await membership.beat()
    assert caplog.text.count("does not answer: no connection: Connection refused") == 1
