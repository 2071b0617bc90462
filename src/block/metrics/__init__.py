"""One row per request, and what rows add up to."""

from block.metrics.row import Row, finished_row, read_rows, row_writer, write_rows
from block.metrics.summary import Summary, summarize

__all__ = ["Row", "Summary", "finished_row", "read_rows", "row_writer", "summarize", "write_rows"]
