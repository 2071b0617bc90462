"""Flags, variables and TOML; the command itself as a process."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from click.testing import CliRunner

from block.cli.serve import command
from block.errors import ConfigError, UnknownNameError
from block.gateway.config import GatewayConfig, InstanceConfig, dump_config, load_config, parse_instance

BLOCK = [sys.executable, "-c", "from block.cli import main; main()", "serve"]


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "g.toml"
    file.write_text(
        'port = 1\npolicy = "random"\nqueue_size = 3\n[[instances]]\nurl = "http://a:1"\npredictor = "http://a:2"\n'
    )
    config = load_config({"port": 9}, file=str(file), environment={"BLOCK_POLICY": "nosim", "BLOCK_PORT": "5"})
    assert (config.port, config.policy, config.queue_size) == (9, "nosim", 3)
    assert config.instances == [InstanceConfig(url="http://a:1", predictor="http://a:2")]
    assert load_config({}, environment={"BLOCK_CONFIG_FILE": str(file)}).queue_size == 3


def test_every_setting_has_a_variable() -> None:
    environment = {
        "BLOCK_INSTANCES": "http://a:1,name=x b:2", "BLOCK_API_KEYS": "k1 k2", "BLOCK_RETRIES": "7", "BLOCK_STALE_AFTER_S": "0.5",
        "BLOCK_DECISION_HEADERS": "false", "BLOCK_ADMIN_KEY": "s", "BLOCK_OTHER": "ignored",
    }  # fmt: skip
    config = load_config({}, environment=environment)
    assert [i.id for i in config.instances] == ["x", "b:2"]
    assert (config.api_keys, config.retries, config.stale_after_s) == (["k1", "k2"], 7, 0.5)
    assert (config.decision_headers, config.admin_key) == (False, "s")


def test_a_dumped_configuration_is_the_same_when_read_again_and_shows_no_key(tmp_path: Path) -> None:
    config = load_config(
        {"instances": [parse_instance("a:1,name=x,predictor=a:2")], "policy": "block-k:k=3"}, environment={}
    )
    file = tmp_path / "dumped.toml"
    file.write_text(dump_config(config))
    again = load_config({}, file=str(file), environment={})
    assert again == load_config({"config_file": str(file)}, file=str(file), environment={})
    assert dump_config(again) == dump_config(config)
    assert "secret" not in dump_config(GatewayConfig(api_keys=["secret"], admin_key="secret"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot = 1", "there is no setting 'prot'. Known: admin_host"),
        ('[[instances]]\nuri = "http://a:1"', "[[instances]]: there is no setting 'uri'. Known: block_size,"),
        ('port = "many"', "port"),
        ("port = 70000", "port must be in 0-65535"),
        ("retries = -1", "retries must not be negative"),
        ('[[instances]]\nurl = "ftp://a"', "must look like http://host:port"),
        ('[[instances]]\nurl = "http://a:1"\n[[instances]]\nurl = "http://a:1"', "Two instances are named"),
        ("port = ", "is not TOML"),
    ],
)
def test_a_wrong_file_is_one_clear_sentence(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "g.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config({}, file=str(file), environment={})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["http://a:1,weight=3", "http://a:1,name=", "http://", "http://a:0", "http://a:1?x=1", "http://u:p@a:1"]
)
def test_a_wrong_instance_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_instance(text)


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BLOCK_")}
    return subprocess.run(
        [*BLOCK, *arguments], capture_output=True, text=True, timeout=60, env=environment, check=False
    )


def test_the_command_says_what_is_wrong_and_exits_with_2() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("--instance", "http://127.0.0.1:1", "--policy", "random", "--port", port)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Port {port} on 127.0.0.1 is in use" in done.stderr.splitlines()[-1]
    done = run("--instance", "http://127.0.0.1:1", "--policy", "bock")
    assert done.returncode == 2
    assert "There is no policy named 'bock'. Known: " in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_dumps_and_checks() -> None:
    done = run("--worker-urls", "http://a:1 http://b:2", "--policy", "random", "--dump-config")
    assert done.returncode == 0
    assert 'policy = "random"' in done.stdout
    assert done.stdout.count("[[instances]]") == 2
    assert run("--static-backends", "http://a:1,http://b:2", "--check-config").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tls-cert-path", "/nowhere.pem"], "The certificates in /nowhere.pem cannot be used"),
        (["--upstream-ca-path", "/nowhere.pem"], "The certificates in /nowhere.pem cannot be used"),
        (["--api-key-file", "/nowhere"], "The API key file /nowhere cannot be read"),
        (["--length-estimator", "tea-leaves"], "There is no length estimator named 'tea-leaves'"),
        (["--service-discovery", "dns"], "needs discovery_name"),
        (["--policy", "tea_leaves"], "There is no policy named 'tea_leaves'"),
    ],
)
def test_checking_finds_what_starting_would(arguments: list[str], says: str) -> None:
    done = CliRunner().invoke(command, ["--worker-urls", "http://a:1", *arguments, "--check-config"])
    assert isinstance(done.exception, ConfigError | UnknownNameError)
    assert says in str(done.exception)


def test_the_command_serves_and_ends_on_sigterm() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BLOCK_")}
    arguments = ["--instance", "http://127.0.0.1:9", "--policy", "random", "--port", "0"]
    with subprocess.Popen([*BLOCK, *arguments], stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if line.startswith("block serve: "))
            assert "0 of 1 instances ready" in line
            url = line.split()[2].rstrip(",")
            with urllib.request.urlopen(url + "/health", timeout=5) as answer:
                assert answer.status == 200
            request = urllib.request.Request(url + "/v1/completions", b'{"model": "m"}')
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request, timeout=5)
            assert json.loads(caught.value.read())["error"]["code"] == "no_ready_endpoint"
            caught.value.close()
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_the_documentation_names_every_setting_metric_and_flag() -> None:
    from block.gateway.records.metrics import Metrics

    text = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text(encoding="utf-8")
    settings = [name for name in GatewayConfig.__struct_fields__ if name != "config_file"]
    metrics = [family.name.removeprefix("block_") for family in Metrics().registry.collect()]
    missing = [name for name in settings + metrics if name not in text]
    assert not missing
