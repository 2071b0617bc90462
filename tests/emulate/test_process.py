"""``block emulate`` as a program: its exit codes, its sentences, what it leaves behind."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from block.predictor.shared_memory import SnapshotReader, snapshot_path

BLOCK = [sys.executable, "-c", "from block.cli import main; main()"]


def start(*arguments):
    return subprocess.Popen([*BLOCK, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments):
    return subprocess.run([*BLOCK, *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def emulator(profile, shm_name):
    process = start("emulate", "--profile", profile, "--port", "0", "--name", shm_name, "--json", "--allow-faults")
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()
        snapshot_path(shm_name).unlink(missing_ok=True)


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_a_signal_and_leaves_nothing_behind(emulator, shm_name, number):
    process, ready = emulator
    assert ready["name"] == shm_name
    done = post(f"{ready['url']}/v1/completions", {"prompt": "Hi", "max_tokens": 3, "ignore_eos": True})
    assert done["usage"]["completion_tokens"] == 3
    reader = SnapshotReader(shm_name)
    assert reader.alive()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")
    assert not reader.path.exists()
    reader.close()


def test_a_killed_engine_is_seen_to_be_dead_and_its_name_is_free(emulator, shm_name, profile):
    process, _ = emulator
    reader = SnapshotReader(shm_name)
    assert reader.alive()
    process.kill()
    process.wait()
    assert reader.path.exists()
    assert not reader.alive()
    again = start("emulate", "--profile", profile, "--port", "0", "--name", shm_name, "--json")
    try:
        assert json.loads(again.stdout.readline())["name"] == shm_name
        assert reader.alive()
        assert reader.read() is not None
    finally:
        again.terminate()
        again.communicate(timeout=20)
    reader.close()


def test_the_exit_fault_is_an_exit(emulator):
    process, ready = emulator
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        post(f"{ready['url']}/emulate/fault", {"kind": "exit"})
    assert process.wait(timeout=20) == 1


def test_the_port_refuses_during_a_cold_start(profile):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start("emulate", "--profile", profile, "--port", str(port), "--startup-duration", "1.5", "--json")
    try:
        time.sleep(0.9)
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0
        url = json.loads(process.stdout.readline())["url"]
        assert post(f"{url}/v1/completions", {"prompt": "Hi", "max_tokens": 1})["object"] == "text_completion"
    finally:
        process.terminate()
        process.communicate(timeout=20)


SAD = {
    "unknown profile": (["--profile", "nope"], "no profile named 'nope'"),
    "speed": (["--speed", "0"], "speed must be greater than 0"),
    "fail rate": (["--fail-rate", "2"], "fail_rate must be between 0 and 1"),
    "name": (["--name", "../x"], "cannot name"),
    "lengths": (["--output-lengths", "poisson:3"], "no output length distribution"),
    "limits": (["--max-num-seqs", "500", "--max-num-batched-tokens", "100"], "must not be below max_num_seqs"),
    "no chunked prefill": (["--no-enable-chunked-prefill"], "without chunked prefill"),
    "host": (["--host", "203.0.113.7"], "Cannot listen"),
    "port": (["--port", "99999"], "not a port"),
}


@pytest.mark.parametrize("case", ["unknown profile", "name", "no chunked prefill", "port"])
def test_a_wrong_flag_is_one_sentence_and_exit_code_2(case, profile):
    arguments, says = SAD[case]
    result = run("emulate", "--profile", profile, "--port", "0", *arguments)
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("case", ["speed", "fail rate", "lengths", "limits", "host"])
def test_a_wrong_setting_is_refused(case, profile):
    from click.testing import CliRunner

    from block.cli.emulate import command
    from block.errors import UserError

    arguments, says = SAD[case]
    result = CliRunner().invoke(command, ["--profile", profile, "--port", "0", *arguments])
    assert isinstance(result.exception, UserError)
    assert says in str(result.exception)


def test_a_port_in_use_is_said(profile):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("emulate", "--profile", profile, "--port", str(taken.getsockname()[1]))
    assert result.returncode == 2
    assert "in use" in result.stderr


def test_a_name_that_a_live_engine_has_is_refused(emulator, shm_name, profile):
    result = run("emulate", "--profile", profile, "--port", "0", "--name", shm_name)
    assert result.returncode == 2
    assert "Another live engine" in result.stderr


def test_help_has_examples():
    result = run("emulate", "--help")
    assert result.returncode == 0
    assert "block emulate --profile" in result.stdout


def test_policies_lists_the_table():
    from block.policy.table import policy_names

    rows = json.loads(run("policies", "--json").stdout)
    assert [row["name"] for row in rows] == policy_names()
    assert all(row["description"] and row["needs"] for row in rows)
    assert "power-of-two" in run("policies").stdout
