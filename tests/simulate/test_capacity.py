"""The capacity search and the commands over the simulator."""

import json
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from block.cli import capacity as capacity_cli
from block.cli import compare as compare_cli
from block.cli import simulate as simulate_cli
from block.core import Slo
from block.errors import BadInputError, ConfigError, UnknownNameError, UserError
from block.metrics import read_rows
from block.metrics.summary import Summary, summarize
from block.simulate import SimulationConfig, load_config, simulate
from block.simulate.capacity import bootstrap_interval, find_capacity, parse_criterion
from block.simulate.config import LengthModel
from block.simulate.sweep import runner, varied
from block.workload import WorkloadConfig

SMALL = """
name = "small"
policy = "block"
[workload]
rate_rps = 4.0
requests = 60
[[instances]]
count = 2
[slo]
ttft_s = 1.0
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    (tmp_path / "small.toml").write_text(SMALL)
    return tmp_path / "small.toml"


def pretended(configs: Sequence[SimulationConfig]) -> list[Summary]:
    """A cluster whose TTFT P99 is 3 s at 20 + seed requests/s and doubles with every request/s."""
    empty = summarize([])
    return [
        msgspec.structs.replace(
            empty, ttft_s_p99=3.0 * 2 ** (c.workload.rate_rps - 20 - c.seed),
            slo_attainment_fraction=1.0 if c.workload.rate_rps < 20 + c.seed else 0.5,
        )
        for c in configs
    ]  # fmt: skip


@pytest.mark.parametrize("start_rps", [1.0, 19.0, 21.0, 22.0, 60.0, 600.0])
def test_the_search_finds_the_rate_where_the_criterion_is_crossed(start_rps: float) -> None:
    config = SimulationConfig(workload=WorkloadConfig(rate_rps=start_rps))
    found = find_capacity(config, parse_criterion("ttft_p99 <= 3"), [1, 2, 3], pretended)
    assert found.per_seed == pytest.approx([21.0, 22.0, 23.0], rel=1e-3)
    assert found.capacity_rps == pytest.approx(22.0, rel=1e-3)
    assert 21.0 <= found.ci_low <= 22.0 <= found.ci_high <= 23.01


def test_attainment_can_be_the_criterion() -> None:
    config = SimulationConfig(workload=WorkloadConfig(rate_rps=10.0), slo=Slo(ttft_s=1.0))
    found = find_capacity(config, parse_criterion("attainment>=99%"), [1], pretended)
    assert found.capacity_rps == pytest.approx(21.0, rel=0.011)
    with pytest.raises(ConfigError, match="no \\[slo\\]"):
        find_capacity(SimulationConfig(), parse_criterion("attainment>=0.99"), [1], pretended)


def test_losing_requests_is_not_capacity() -> None:
    def losing(configs: Sequence[SimulationConfig]) -> list[Summary]:
        return [msgspec.structs.replace(s, requests=10, finished=9, ttft_s_p99=0.1) for s in pretended(configs)]

    with pytest.raises(ConfigError, match="does not hold even at"):
        find_capacity(SimulationConfig(), parse_criterion("ttft_p99<=3"), [1], losing)


def test_a_criterion_that_holds_everywhere_has_no_capacity() -> None:
    def idle(configs: Sequence[SimulationConfig]) -> list[Summary]:
        return [msgspec.structs.replace(s, ttft_s_p99=0.1) for s in pretended(configs)]

    with pytest.raises(ConfigError, match="ttft_p99<=3 still holds at"):
        find_capacity(SimulationConfig(), parse_criterion("ttft_p99<=3"), [1], idle)


@pytest.mark.parametrize(
    "text",
    ["ttft<=3", "ttft_p98<=3", "ttft_p99>=3", "attainment<=1", "ttft_p99<=0", "attainment>=2", "1..2", ""],
)
def test_a_criterion_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="Write a criterion as"):
        parse_criterion(text)


def test_the_interval_covers_the_mean_and_shrinks_to_it() -> None:
    low, high = bootstrap_interval([1.0, 2.0, 3.0, 4.0])
    assert 1.0 <= low < 2.5 < high <= 4.0
    assert bootstrap_interval([2.0, 2.0]) == (2.0, 2.0)


def test_processes_and_one_process_give_the_same(small: Path) -> None:
    configs = [varied(load_config(small), seed=seed) for seed in (1, 2, 3)]
    with runner(1) as alone, runner(2) as two:
        assert alone(configs) == two(configs)


def test_the_shipped_paper_setting_is_what_the_paper_states() -> None:
    config = load_config(Path(__file__).parents[2] / "experiments" / "paper-default.toml")
    limits = config.instances[0].limits
    assert config.instance_count == 12
    assert (limits.max_num_seqs, limits.max_num_batched_tokens, limits.blocks_usable) == (48, 512, 1052)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('colour = "red"\n' + SMALL, "Unknown at the top: colour (known: name, seed"),
        (SMALL + "[gateways]\nnumber = 2\n", "Unknown in gateways: number (known: count"),
        (SMALL.replace("count = 2", "count = 2\nlimits = {max_seqs = 1}"), "in instances[0].limits: max_seqs"),
        (SMALL.replace("requests = 60", 'requests = "many"'), "Expected `int | null`, got `str`"),
        (SMALL.replace("count = 2", "count = 0"), "count of at least 1"),
        (SMALL.replace("count = 2", "count = 2\nlimits = {block_size = 0}"), "block_size must be at least 1"),
        (SMALL + "[[failures]]\ninstance = 7\nat_s = 1\nfor_s = 1\n", "no instance 7"),
        (SMALL + "[[failures]]\ninstance = 1\nat_s = -1\nfor_s = 1\n", "at_s and detection_s of at least 0"),
        (SMALL + "[[failures]]\ninstance = 1\nat_s = 1\nfor_s = 0\n", "for_s above 0"),
        (SMALL.replace("ttft_s = 1.0", "ttft_s = -1.0"), "are seconds above 0"),
        ("instances = []\n", "at least one"),
        ("seed = -1\n" + SMALL, "must not be negative"),
        (SMALL.replace("requests = 60", "requests = -5"), "at least 1 request"),
        (SMALL.replace("requests = 60", "requests = 1000000000000"), "at most 10,000,000"),
        (SMALL.replace("rate_rps = 4.0", "rate_rps = inf"), "above 0 requests/s"),
        (SMALL.replace("requests = 60", "requests = 60\nmax_tokens = 0"), "max_tokens must be at least 1"),
        (SMALL.replace("requests = 60", "requests = 60\ntotal_tokens_max = 1"), "must be at least 2"),
        (SMALL.replace("count = 2", "count = 1000000000"), "instances at most"),
        (SMALL + "[gateways]\nsnapshot_interval_s = 1e-9\n", "at least 0.001"),
    ],
)
def test_a_wrong_configuration_is_one_clear_sentence(tmp_path: Path, change: str, said: str) -> None:
    (tmp_path / "c.toml").write_text(change)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.toml")
    assert said in str(caught.value)


def test_a_configuration_that_cannot_be_read_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="There is no file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "c.toml").write_text("[workload")
    with pytest.raises(BadInputError, match="cannot be read"):
        load_config(tmp_path)
    with pytest.raises(BadInputError, match="is not TOML"):
        load_config(tmp_path / "c.toml")


def test_a_trace_is_looked_for_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("num_prefill_tokens,num_decode_tokens\n10,5\n20,5\n")
    (tmp_path / "c.toml").write_text('[workload]\ntrace = "t.csv"\nrequests = 2\n')
    assert load_config(tmp_path / "c.toml").workload.trace == str(tmp_path / "t.csv")


def test_simulate_prints_summaries_and_writes_rows(small: Path) -> None:
    out = small.parent / "rows.csv"
    arguments = [
        str(small),
        "--policy",
        "random",
        "--policy",
        "block-k:k=2",
        "--rate",
        "5",
        "--out",
        str(out),
        "--json",
    ]
    result = CliRunner().invoke(simulate_cli.command, arguments)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert (printed["name"], printed["seed"], printed["rate_rps"]) == ("small", 1, 5.0)
    summaries = printed["policies"]
    assert summaries["random"]["requests"] == summaries["block-k:k=2"]["requests"] == 54
    assert summaries["random"]["slo_attainment_fraction"] is not None
    assert len(read_rows(out)) == 120
    table = CliRunner().invoke(simulate_cli.command, [str(small)])
    assert "small, 4 requests/s, seed 1" in table.stdout


def test_capacity_prints_what_it_found(small: Path) -> None:
    small.write_text(SMALL.replace("count = 2", "count = 2\nlimits = {max_num_seqs = 2}"))
    arguments = ["--config", str(small), "--seeds", "2", "--jobs", "1", "--tolerance", "0.2", "--json"]
    result = CliRunner().invoke(capacity_cli.command, [*arguments, "--criterion", "ttft_p99<=0.2"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ci_low"] <= found["capacity_rps"] <= found["ci_high"]
    assert (found["criterion"], found["seeds"], found["policy"]) == ("ttft_p99<=0.2", [1, 2], "block")


def test_a_cluster_that_never_fills_is_said_to_be_so(small: Path) -> None:
    small.write_text(SMALL.replace("count = 2", "count = 2\nlimits = {max_num_seqs = 2}"))
    arguments = ["--config", str(small), "--seeds", "1", "--jobs", "1", "--tolerance", "0.5", "--policy", "random"]
    result = CliRunner().invoke(capacity_cli.command, [*arguments, "--requests", "6", "--criterion", "ttft_p99<=0.1"])
    assert result.exit_code == 0, result.output
    assert "6 requests come within" in result.stderr
    assert "1 seed" in result.stdout
    assert "interval" not in result.stdout.splitlines()[-1]  # one seed has none


def test_what_cannot_be_is_said_before_anything_is_simulated(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("simulated")

    monkeypatch.setattr("block.simulate.simulate", never)
    monkeypatch.setattr("block.simulate.capacity.find_capacity", never)
    one, two = [str(small)], ["--config", str(small)]
    small.write_text(SMALL.replace("count = 2", "count = 2\n[[instances]]\nspeed = 0.5"))
    for program, arguments, said in (
        (simulate_cli, [*one, "--policy", "random", "--policy", "best"], "no policy named 'best'"),
        (simulate_cli, [*one, "--out", "rows.txt"], r"\.csv or \.parquet"),
        (simulate_cli, [*one, "--requests", "0"], "at least 1 request"),
        (simulate_cli, [*one, "--chart", str(small.parent / "no" / "c.svg")], "does not exist"),
        (capacity_cli, [*two, "--pooled"], "Only equal instances"),
        (capacity_cli, [*two, "--requests", "-1"], "at least 1 request"),
    ):
        result = CliRunner().invoke(program.command, arguments)
        assert isinstance(result.exception, UserError), result.output
        assert re.search(said, str(result.exception))


def test_compare_prints_every_policy_at_every_rate(small: Path) -> None:
    out, chart = small.parent / "c.csv", small.parent / "c.svg"
    arguments = ["--config", str(small), "--policy", "random", "--policy", "block", "--rates", "2:4:1", "--seeds", "2"]
    result = CliRunner().invoke(
        compare_cli.command, [*arguments, "--jobs", "1", "--json", "--out", str(out), "--chart", str(chart)]
    )
    assert result.exit_code == 0, result.output
    cells = json.loads(result.stdout)
    assert [(c["rate_rps"], c["policy"]) for c in cells] == [
        (r, p) for r in (2.0, 3.0, 4.0) for p in ("random", "block")
    ]
    assert all(c["figures"]["ttft_s_p99"] > 0 for c in cells)
    assert len(out.read_text().splitlines()) == 7
    assert chart.exists()
    table = CliRunner().invoke(compare_cli.command, [*arguments, "--jobs", "1"])
    assert "small, 2 seeds" in table.stdout
    assert "SLO met" in table.stdout
    assert table.stderr == ""


def test_compare_takes_fewer_requests_and_shows_no_column_without_targets(small: Path) -> None:
    small.write_text(SMALL[: SMALL.index("[slo]")])
    arguments = ["--config", str(small), "--policy", "random", "--rates", "4", "--requests", "20", "--jobs", "1"]
    table = CliRunner().invoke(compare_cli.command, arguments)
    assert "small, 1 seed" in table.stdout
    assert "SLO met" not in table.stdout
    cells = json.loads(CliRunner().invoke(compare_cli.command, [*arguments, "--json"]).stdout)
    assert cells[0]["figures"]["requests"] == 18  # a tenth is warm-up


@pytest.mark.parametrize("rates", ["fast", "3:1:1", "1:2", "0,1", "1:2:0", "1:2:nan", "1:1e9:0.001"])
def test_rates_that_are_none_are_refused(small: Path, rates: str) -> None:
    result = CliRunner().invoke(compare_cli.command, ["--config", str(small), "--policy", "block", "--rates", rates])
    assert isinstance(result.exception, ConfigError)


@pytest.mark.parametrize("command", ["simulate", "capacity", "compare"])
def test_a_policy_that_does_not_exist_is_refused_by_name(small: Path, command: str) -> None:
    given = {
        "simulate": (simulate_cli.command, [str(small)]),
        "capacity": (capacity_cli.command, ["--config", str(small), "--jobs", "2"]),
        "compare": (compare_cli.command, ["--config", str(small), "--rates", "4"]),
    }
    program, arguments = given[command]
    result = CliRunner().invoke(program, [*arguments, "--policy", "best"])
    assert isinstance(result.exception, UserError)
    assert "round-robin" in str(result.exception)


def test_an_error_made_in_another_process_says_the_same_here() -> None:
    made = UnknownNameError("policy", "best", ["block", "random"])
    assert str(pickle.loads(pickle.dumps(made))) == str(made)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), 2.0])
def test_a_tolerance_that_no_search_can_reach_is_refused(tolerance: float) -> None:
    with pytest.raises(ConfigError, match="tolerance"):
        find_capacity(SimulationConfig(), parse_criterion("ttft_p99<=3"), [1], lambda _: [], tolerance=tolerance)


@pytest.mark.parametrize(("options", "said"), [({"noise": -1.0}, "negative"), ({"colour": 1}, "no option 'colour'")])
def test_what_an_oracle_cannot_be_is_one_clear_sentence(options: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        simulate(SimulationConfig(lengths=LengthModel(options=options)))
