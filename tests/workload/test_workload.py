"""Arrivals, lengths, traces: what a workload offers."""

import gzip
from pathlib import Path

import msgspec
import numpy as np
import pytest

from block.errors import BadInputError, ConfigError, UnknownNameError
from block.metrics import row_writer
from block.simulate import SimulationConfig, simulate
from block.workload import Offered, WorkloadConfig, offer
from block.workload.arrivals import ARRIVALS, bursts, gamma, rescaled
from block.workload.chance import generator, pyrandom
from block.workload.length_table import length_names, load_lengths, table_of
from block.workload.trace import read_trace


@pytest.mark.parametrize("name", list(ARRIVALS))
def test_arrivals_keep_their_mean_rate_and_never_go_back(name: str) -> None:
    times_s = ARRIVALS[name](20.0, 40_000, generator(1, "arrivals"))
    assert times_s.shape == (40_000,)
    assert times_s[0] >= 0
    assert (np.diff(times_s) >= 0).all()
    assert 40_000 / times_s[-1] == pytest.approx(20.0, rel=0.05)


@pytest.mark.parametrize("cv2", [0.25, 1.0, 4.0])
def test_gamma_gaps_have_the_variation_asked_for(cv2: float) -> None:
    gaps_s = np.diff(gamma(10.0, 100_000, generator(2, "arrivals"), gap_cv2=cv2))
    assert gaps_s.var() / gaps_s.mean() ** 2 == pytest.approx(cv2, rel=0.05)


def test_bursts_are_burstier_than_poisson_and_silent_between() -> None:
    times_s = bursts(10.0, 50_000, generator(3, "arrivals"), on_s=5.0, off_s=15.0)
    per_second = np.histogram(times_s, bins=np.arange(0, times_s[-1], 1.0))[0]
    assert per_second.var() > 10 * per_second.mean()
    assert (per_second == 0).mean() > 0.5
    softer = bursts(10.0, 50_000, generator(3, "arrivals"), on_s=5.0, off_s=15.0, quiet_fraction=0.5)
    assert (np.histogram(softer, bins=np.arange(0, softer[-1], 1.0))[0] == 0).mean() < 0.05


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda g: gamma(0.0, 5, g), "above 0"),
        (lambda g: gamma(1.0, 0, g), "at least 1 request"),
        (lambda g: gamma(1.0, 5, g, gap_cv2=0.0), "constant arrivals"),
        (lambda g: bursts(1.0, 5, g, on_s=0.0), "on_s"),
        (lambda g: rescaled([1.0, 1.0], 5.0), "two different times"),
        (lambda g: rescaled([1.0, 2.0], 5.0, 3), "has 2 requests"),
    ],
)
def test_impossible_arrivals_are_refused_in_one_sentence(call: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        call(generator(1, "x"))


def test_recorded_times_are_stretched_to_the_rate_asked_for() -> None:
    assert rescaled([100.0, 101.0, 104.0], None).tolist() == [0.0, 1.0, 4.0]
    assert rescaled([100.0, 101.0, 104.0], 1.0).tolist() == [0.0, 0.5, 2.0]


def test_sharegpt_lengths_have_the_published_statistics() -> None:
    prompt, output = load_lengths("sharegpt").draw(100_000, generator(1, "lengths"))
    published = ((prompt, 246, 35, 2863), (output, 326, 286, 1001))
    for drawn, mean, median, p99 in published:
        assert drawn.mean() == pytest.approx(mean, rel=0.03)
        assert np.median(drawn) == pytest.approx(median, rel=0.06)
        assert np.quantile(drawn, 0.99) == pytest.approx(p99, rel=0.05)
        assert drawn.min() >= 1
    assert (prompt + output).max() <= 8192


@pytest.mark.parametrize("name", length_names())
def test_shipped_length_tables_are_small_and_say_their_source(name: str) -> None:
    table = load_lengths(name)
    assert table.name == name
    assert len(table.source) > 30
    assert len(msgspec.json.encode(table)) < 50_000


def test_a_fitted_table_keeps_how_prompt_and_output_hang_together() -> None:
    rng = generator(5, "fit")
    prompt = rng.lognormal(5, 1, 5000)
    output = prompt * rng.lognormal(0, 0.3, 5000)
    drawn = table_of(prompt, output, name="x", source="made up").draw(20_000, generator(6, "draw"))
    assert np.corrcoef(np.log(drawn[0]), np.log(drawn[1]))[0, 1] == pytest.approx(
        np.corrcoef(np.log(prompt), np.log(output))[0, 1], abs=0.03
    )
    with pytest.raises(ConfigError, match="too few"):
        table_of([1.0] * 10, [1.0] * 10, name="x", source="x")


def test_an_unknown_length_table_lists_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="sharegpt"):
        load_lengths("chat")
    (tmp_path / "bad.json").write_text('{"name": 3}')
    with pytest.raises(BadInputError, match="not a length table"):
        load_lengths(str(tmp_path / "bad.json"))


def test_the_same_seed_offers_the_same_and_another_rate_the_same_lengths() -> None:
    def lengths(offered: list[Offered]) -> list[tuple[int, int]]:
        return [(o.request.prompt_tokens, o.output_tokens) for o in offered]

    slow, fast = WorkloadConfig(rate_rps=5.0), WorkloadConfig(rate_rps=10.0)
    assert offer(slow, 1) == offer(slow, 1)
    assert lengths(offer(slow, 1)) == lengths(offer(fast, 1)) != lengths(offer(slow, 2))
    times = [[o.request.arrived_s for o in offer(config, 1)] for config in (slow, fast)]
    assert np.array(times[0]) == pytest.approx(2 * np.array(times[1]))


def test_the_system_sees_the_true_length_only_if_the_client_fixed_it() -> None:
    hidden = offer(WorkloadConfig(requests=50, max_tokens=2000), 1)
    assert {o.request.max_tokens for o in hidden} == {2000}
    exact = offer(WorkloadConfig(requests=50, exact_output=True), 1)
    assert [o.request.max_tokens for o in exact] == [o.output_tokens for o in exact]
    names = {field.name for field in msgspec.structs.fields(type(hidden[0].request))}
    assert "output_tokens" not in names, "law L7: a request does not carry its true length"


def test_streams_of_chance_are_independent_by_name() -> None:
    assert generator(1, "a").random() == generator(1, "a").random() != generator(1, "b").random()
    assert pyrandom(1, "a").random() == pyrandom(1, "a").random() != pyrandom(2, "a").random()


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
"""
MOONCAKE = """{"timestamp": 0, "input_length": 600, "output_length": 50, "hash_ids": [0, 1]}
{"timestamp": 3000, "input_length": 700, "output_length": 40, "hash_ids": [0, 2]}
"""
LENGTHS = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3742,284,4026,0.07\n18,243,261,13.5\n"


def test_trace_formats_are_told_apart_by_their_first_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(AZURE)
    azure = read_trace(tmp_path / "a.csv")
    assert [(r.prompt_tokens, r.output_tokens) for r in azure] == [(4808, 10), (3180, 8)]
    assert azure[1].arrived_s - azure[0].arrived_s == pytest.approx(0.052)
    with gzip.open(tmp_path / "m.jsonl.gz", "wt") as file:
        file.write(MOONCAKE)
    mooncake = read_trace(tmp_path / "m.jsonl.gz")
    assert [r.arrived_s for r in mooncake] == [0.0, 3.0]
    assert mooncake[1].blocks.keys == (0, 2)
    (tmp_path / "s.csv").write_text(LENGTHS)
    assert [(r.arrived_s, r.prompt_tokens) for r in read_trace(tmp_path / "s.csv")] == [(None, 3742), (None, 18)]


@pytest.mark.parametrize(
    ("header", "line", "first_s"),
    [
        ("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type", '5,"ChatGPT, 4",472,18,490,API', 5.0),
        ("request_id,arrival_timestamp,prompt_size,token_size", "7,0.25,472,18", 0.25),
        ("request,arrived_s,prompt_tokens,output_tokens,ttft_s,e2e_s", "0,0.1,472,18,0.2,1.5", 0.1),
        ("arrived_at,num_prefill_tokens,num_decode_tokens", "3.5,472,18", 3.5),
    ],
)
def test_columns_are_known_by_the_names_that_public_traces_give_them(
    tmp_path: Path, header: str, line: str, first_s: float
) -> None:
    (tmp_path / "t.csv").write_text(f"{header}\n{line}\n")
    (request,) = read_trace(tmp_path / "t.csv")
    assert (request.arrived_s, request.prompt_tokens, request.output_tokens) == (first_s, 472, 18)


def test_rows_that_block_wrote_can_be_offered_again(tmp_path: Path) -> None:
    rows = simulate(SimulationConfig(workload=WorkloadConfig(rate_rps=5, requests=20)))
    with row_writer(tmp_path / "rows.csv") as writer:
        for row in rows:
            writer.write(row)
    again = read_trace(tmp_path / "rows.csv")
    assert [(r.prompt_tokens, r.output_tokens) for r in again] == [(r.prompt_tokens, r.output_tokens) for r in rows]
    assert [r.arrived_s for r in again] == pytest.approx([r.intended_s for r in rows])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (AZURE.replace("3180", "x"), "line 3: invalid literal"),
        (AZURE.replace(",8\n", "\n"), "line 3: 2 columns instead of 3"),
        (AZURE.replace("18:17:04", "17:17:04"), "line 3: its time lies before"),
        (AZURE.replace("2023-11-16 18:17:04.0319600", "yesterday"), "line 3: "),
        (AZURE.replace("2023-11-16 18:17:04.0319600", "nan"), "line 3: nan is no time"),
        (MOONCAKE.replace("700", "-7"), "line 2: -7 prompt"),
        (MOONCAKE.replace('"output_length": 40', '"output": 40'), "line 2: .*output_length"),
        (LENGTHS.splitlines()[0], "has no requests"),
        ("hello\n", "no known trace"),
        ("", "no known trace"),
    ],
)
def test_a_bad_trace_is_refused_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(BadInputError, match=said):
        read_trace(tmp_path / "t")


def test_a_missing_or_broken_trace_file_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no trace file"):
        read_trace(tmp_path / "none")
    (tmp_path / "t.gz").write_text("not gzip")
    with pytest.raises(BadInputError, match="cannot be read"):
        read_trace(tmp_path / "t.gz")


def test_a_trace_workload_keeps_times_prefixes_and_order(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text(MOONCAKE)
    config = WorkloadConfig(trace=str(tmp_path / "m.jsonl"), arrivals="trace", rate_rps=None, requests=None)
    offered = offer(config, 1)
    assert [o.request.arrived_s for o in offered] == [0.0, 3.0]
    assert offered[0].blocks.keys == (0, 1)
    poisson = msgspec.structs.replace(config, arrivals="poisson", rate_rps=1.0, order="shuffled")
    assert {o.request.prompt_tokens for o in offer(poisson, 3)} == {600, 700}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"arrivals": "trace"}, "needs a trace file"),
        ({"rate_rps": None}, "need a rate"),
        ({"requests": None}, "how many requests"),
        ({"trace": "{lengths}", "arrivals": "trace"}, "has no times"),
        ({"trace": "{lengths}", "requests": 3}, "has 2 requests"),
        ({"trace": "{lengths}", "requests": 2, "arrivals": "trace", "order": "shuffled"}, "cannot be shuffled"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(tmp_path: Path, fields: dict[str, object], said: str) -> None:
    (tmp_path / "s.csv").write_text(LENGTHS)
    if "trace" in fields:
        fields = {"requests": 2} | fields | {"trace": str(tmp_path / "s.csv")}
    with pytest.raises(ConfigError, match=said):
        offer(WorkloadConfig(**fields), 1)


def test_long_requests_are_cut_to_what_the_model_can_hold() -> None:
    offered = offer(WorkloadConfig(requests=20, prompt_tokens=5000, output_tokens=300, total_tokens_max=4096), 1)
    assert {(o.request.prompt_tokens, o.output_tokens) for o in offered} == {(4095, 1)}
