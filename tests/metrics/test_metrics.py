"""Rows, their files, their summary, their table and chart."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from block.core import Slo
from block.errors import BadInputError, ConfigError
from block.metrics import Row, finished_row, read_rows, row_writer, summarize, write_rows
from block.metrics.charts import latency_chart, line_style
from block.metrics.tables import summary_json, summary_table


def done(number: int, *, ttft_s: float = 0.1, e2e_s: float = 1.1, tokens: int = 11, **fields: object) -> Row:
    at = float(number)
    given = {"id": f"r{number}", "policy": "p", "instance": "a", "sent_s": at + 0.01, "prompt_tokens": 5}
    return finished_row(
        intended_s=at, first_token_s=at + ttft_s, finished_s=at + e2e_s, output_tokens=tokens, **given | fields
    )


def failed(number: int, status: str = "failed") -> Row:
    at = float(number)
    return Row(
        id=f"r{number}", policy="p", instance=None, intended_s=at, sent_s=at, first_token_s=None, finished_s=None,
        prompt_tokens=5, output_tokens=0, ttft_s=None, e2e_s=None, tpot_s=None, status=status, error='said "no", twice',
    )  # fmt: skip


def test_latency_counts_from_the_intended_time_and_tpot_from_the_first_token() -> None:
    row = done(3, ttft_s=0.5, e2e_s=2.5, tokens=5)
    assert (row.ttft_s, row.e2e_s, row.tpot_s) == (0.5, 2.5, 0.5)
    assert done(3, tokens=1).tpot_s is None


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_rows_survive_a_file(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pip install pyarrow to test Parquet files")
    rows = [done(0), failed(1), done(2, instance=None, preemptions=2, predicted_e2e_s=1.5)]
    write_rows(tmp_path / f"rows{suffix}", rows)
    assert read_rows(tmp_path / f"rows{suffix}") == rows


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_an_interrupted_run_keeps_the_rows_it_had(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pip install pyarrow to test Parquet files")
    path = tmp_path / f"rows{suffix}"

    def interrupted() -> None:
        with row_writer(path) as writer:
            for number in range(7):
                writer.write(done(number))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert len(read_rows(path)) == 7


def test_a_csv_row_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with row_writer(tmp_path / "rows.csv") as writer:
        writer.write(done(0))
        assert read_rows(tmp_path / "rows.csv") == [done(0)]


def test_rows_that_cannot_be_written_or_read_are_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"csv or \.parquet"):
        row_writer(tmp_path / "rows.xlsx")
    with pytest.raises(ConfigError, match="does not exist"):
        row_writer(tmp_path / "no" / "rows.csv")
    with pytest.raises(BadInputError, match="no file of rows"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("id,policy\nr1,p\n")
    with pytest.raises(BadInputError, match="line 2: not a row"):
        read_rows(tmp_path / "bad.csv")
    (tmp_path / "bad.csv").write_text("id,policy,intended_s\nr1,p,soon\n")
    with pytest.raises(BadInputError, match="line 2: not a row"):
        read_rows(tmp_path / "bad.csv")


def test_attainment_divides_by_all_requests_offered() -> None:
    rows = [done(0), done(1, ttft_s=3.0, e2e_s=3.5), failed(2), failed(3, "rejected")]
    summary = summarize(rows, Slo(ttft_s=1.0))
    assert (summary.requests, summary.finished, summary.failed, summary.rejected) == (4, 2, 1, 1)
    assert summary.slo_attainment_fraction == 0.25
    assert summary.goodput_rps == pytest.approx(1 / 4.5)
    assert summary.requests_rps == pytest.approx(2 / 4.5)
    assert summary.lateness_s_p99 == pytest.approx(0.01, rel=0.1)


def test_a_request_meets_its_targets_only_if_it_meets_all() -> None:
    rows = [done(0, ttft_s=0.1, e2e_s=1.1, tokens=11)]  # 100 ms a token
    assert summarize(rows, Slo(ttft_s=0.1000001, tpot_s=0.11, e2e_s=2.0)).slo_attainment_fraction == 1.0
    assert summarize(rows, Slo(ttft_s=0.2, tpot_s=0.09)).slo_attainment_fraction == 0.0
    assert summarize([done(0, tokens=1)], Slo(tpot_s=0.001)).slo_attainment_fraction == 1.0


def test_percentiles_and_preemptions() -> None:
    summary = summarize([done(n, ttft_s=0.01 * n, e2e_s=5.0, preemptions=n % 2) for n in range(101)])
    assert summary.ttft_s_p50 == pytest.approx(0.5)
    assert summary.ttft_s_p99 == pytest.approx(0.99)
    assert summary.preemptions == 50
    assert summary.slo_attainment_fraction is None
    assert summarize([done(n) for n in range(10)]).preemptions is None


def test_the_warm_up_is_left_out() -> None:
    rows = [done(n, ttft_s=9.0 if n < 10 else 0.1, e2e_s=10.0) for n in range(100)]
    assert summarize(rows, warmup_fraction=0.1).ttft_s_mean == pytest.approx(0.1)
    assert summarize(rows, warmup_fraction=0.1).requests == 90


def test_nothing_sums_up_to_nothing() -> None:
    assert summarize([], Slo(ttft_s=1.0)).ttft_s_mean is None
    assert summarize([failed(0)], Slo(ttft_s=1.0)).slo_attainment_fraction == 0.0


def test_the_table_marks_the_best_and_json_has_the_figures() -> None:
    summaries = {
        "good": summarize([done(0)]),
        "bad": summarize([done(0, ttft_s=2.0, e2e_s=12.0)]),
        "none": summarize([]),
    }
    console = Console(file=StringIO(), force_terminal=True, width=160)
    console.print(summary_table(summaries, "figures"))
    text = console.file.getvalue()
    assert "\x1b[1m0.100\x1b[0m" in text
    assert "good" in text
    fields = summary_json(summaries["good"])
    assert {
        "requests",
        "failed",
        "ttft_s_mean",
        "ttft_s_p50",
        "ttft_s_p99",
        "e2e_s_mean",
        "e2e_s_p99",
        "preemptions",
    } <= set(fields)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_chart_is_drawn_by_its_suffix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"chart{suffix}"
    latency_chart(
        {"a": [done(n) for n in range(9)], "b": [done(n, ttft_s=0.2) for n in range(9)], "c": []}, path, "title"
    )
    assert path.read_bytes().startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_as_many_lines_as_there_are_policies_are_told_apart() -> None:
    styles = [tuple(line_style(number).values()) for number in range(40)]
    assert len(set(styles)) == 40


def test_a_chart_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.png or \.svg"):
        latency_chart({}, tmp_path / "chart.pdf")
