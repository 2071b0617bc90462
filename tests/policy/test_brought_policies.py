"""Policies that other installed packages bring: found by name, listed, and a clear error where one is no use."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from click.testing import CliRunner

from block.cli.policies import command
from block.core import Candidate, InstanceId, Load, Request
from block.errors import ConfigError, UnknownNameError
from block.policy import decide, make_policy, policy_from, policy_names
from block.policy import table as policy_table

MODULE = """
from block.core import Candidate, Request
from block.policy.rank import Evidence, Rank
from block.policy.shortlist import Everyone
from block.policy.table import Policy, PolicySpec


class MostInFlight(Rank):
    needs = Evidence.LOAD

    def __init__(self, weight):
        self.weight = weight

    def cost(self, request, candidate):
        return -self.weight * candidate.load.in_flight


POLICY = PolicySpec("the busiest", lambda weight=1: Policy("", Everyone(), MostInFlight(weight)))
NOTHING = "not a policy"
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As pip would have installed it."""
    (tmp_path / "brought_by_test.py").write_text(MODULE)
    info = tmp_path / "brought_by_test-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought-by-test\nVersion: 1.0\n")
    points = ("busiest = brought_by_test:POLICY", "wrong = brought_by_test:NOTHING", "gone = brought_by_test:MISSING",
              "block = brought_by_test:POLICY")  # fmt: skip
    (info / "entry_points.txt").write_text("[block.policies]\n" + "\n".join(points) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    policy_table._brought.cache_clear()
    yield
    policy_table._brought.cache_clear()


@pytest.mark.usefixtures("package")
def test_a_brought_policy_decides_under_its_name_and_takes_options() -> None:
    assert "busiest" in policy_names()
    calm, busy = (Candidate(InstanceId(str(n)), Load(running=n, waiting=0, in_flight=n)) for n in (1, 5))
    request = Request(id="r", arrived_s=0.0, prompt_tokens=10)
    assert decide(make_policy("busiest"), request, [calm, busy], Random(1)).instance == busy.instance
    assert decide(policy_from("busiest:weight=-1"), request, [calm, busy], Random(1)).instance == calm.instance


@pytest.mark.usefixtures("package")
def test_it_does_not_take_the_place_of_a_policy_of_the_table() -> None:
    assert make_policy("block").hold is not None
    assert policy_names().count("block") == 1


@pytest.mark.usefixtures("package")
def test_one_that_is_no_use_is_said_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match="brought_by_test:NOTHING is not a PolicySpec"):
        make_policy("wrong")
    with pytest.raises(ConfigError, match="gone cannot be loaded from brought_by_test:MISSING"):
        make_policy("gone")
    with pytest.raises(UnknownNameError, match="busiest"):
        make_policy("no-such-policy")


@pytest.mark.usefixtures("package")
def test_one_that_is_no_use_here_hides_none_of_the_others_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    rows = {row["name"]: row for row in json.loads(CliRunner().invoke(command, ["--json"]).stdout)}
    assert list(rows) == policy_names()
    assert rows["block"]["needs"] == "prediction"
    assert rows["busiest"]["options"] == {"weight": 1}
    assert "is not a PolicySpec" in rows["wrong"]["unavailable"]
    assert "pip install block-llm[learned]" in rows["learned"]["unavailable"]
    table = CliRunner().invoke(command, [])
    assert table.exit_code == 0
    assert "busiest" in table.stdout
