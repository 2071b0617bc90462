"""``block predictor`` beside ``block emulate``: two real processes."""

import json
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import msgspec
import pytest

from .profile import PROFILE

BLOCK = [sys.executable, "-c", "from block.cli import main; main()"]


def start(*arguments):
    process = subprocess.Popen([*BLOCK, *arguments, "--port", "0", "--json"], stdout=subprocess.PIPE, text=True)
    return process, json.loads(process.stdout.readline())["url"]


def run(*arguments):
    return subprocess.run([*BLOCK, *arguments], capture_output=True, text=True, timeout=60, check=False)


def call(url, body=None, headers=None):
    raw = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, raw, headers or {}), timeout=30) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def until(condition, tries=300):
    for _ in range(tries):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not become true")


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "test.json"
    path.write_bytes(msgspec.json.encode(PROFILE))
    return str(path)


@pytest.fixture
def pair(profile, shm_name):
    """(emulator's process, its URL, predictor's process, its URL)."""
    processes = []
    try:
        processes.append(start("emulate", "--name", shm_name, "--profile", profile))
        processes.append(start("predictor", "--source", f"emulate:{shm_name}", "--profile", profile))
        yield *processes[0], *processes[1]
    finally:
        for process, _ in processes:
            process.terminate()
        for process, _ in processes:
            process.communicate(timeout=20)


def test_a_prediction_comes_true(pair):
    """What the predictor says of a request under load is what the client then meets, within the emulator's lateness."""
    _, engine, _, predictor = pair
    until(lambda: call(f"{predictor}/health")[0] == 200)
    body = {"prompt": "x" * 800, "max_tokens": 600, "ignore_eos": True}
    others = [threading.Thread(target=call, args=(f"{engine}/v1/completions", body)) for _ in range(4)]
    for thread in others:
        thread.start()
    until(lambda: call(f"{predictor}/snapshot")[1]["header"]["running"] == 4)
    status, said = call(
        f"{predictor}/predict", {"prompt_tokens": 100, "max_tokens": 400, "output_tokens": 400, "harm": True}
    )
    started_s = time.monotonic()
    call(f"{engine}/v1/completions", {"prompt": "y" * 400, "max_tokens": 400, "ignore_eos": True})
    met_s = time.monotonic() - started_s
    for thread in others:
        thread.join()
    assert status == 200
    assert 0 < said["ttft_s"] < said["e2e_s"]
    assert said["harm_s"] >= 0
    assert 0.6 * said["e2e_s"] < met_s < 3 * said["e2e_s"] + 0.5  # a busy machine is late, never early


def test_a_killed_engine_means_503_and_the_predictor_lives_on(pair):
    engine_process, _, predictor_process, predictor = pair
    until(lambda: call(f"{predictor}/health")[0] == 200)
    engine_process.kill()
    until(lambda: call(f"{predictor}/health")[0] == 503)
    status, body = call(f"{predictor}/predict", {"prompt_tokens": 10})
    assert (status, body["error"]["code"]) == (503, 503)
    assert predictor_process.poll() is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--source", "emulate:x", "--profile", "nope"], "no profile named 'nope'"),
        (["--source", "telepathy:x"], "no source named 'telepathy'"),
        (["--source", "emulate:"], "Say which engine"),
        (["--source", "emulate:a/b"], "cannot name"),
        (["--source", "emulate:x", "--speed", "0"], "--speed"),
    ],
)
def test_a_wrong_flag_is_one_sentence(arguments, says, profile):
    from click.testing import CliRunner

    from block.cli.predictor import command
    from block.errors import UserError

    result = CliRunner().invoke(command, ["--profile", profile, "--port", "0", *arguments])
    assert isinstance(result.exception, UserError)
    assert says in str(result.exception)
    assert str(result.exception).endswith(".")


def test_a_wrong_flag_is_exit_code_2():
    result = run("predictor", "--source", "emulate:x", "--profile", "nope")
    assert result.returncode == 2
    assert result.stderr.startswith("block: There is no profile")


def test_help_has_examples():
    assert "block predictor --source" in run("predictor", "--help").stdout
