"""Joint (prompt, output) token lengths drawn from shipped quantile tables, or given.

A table holds the quantile function of the prompt length and, for bins of equal prompt probability, that of the
output length. Drawing interpolates both, so neighbouring lengths come too and no recorded request is copied.
``experiments/derive_lengths.py`` made the tables and states their sources.
"""

from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from block.errors import BadInputError, ConfigError, UnknownNameError

SHIPPED = Path(__file__).parent / "lengths"
Lengths = npt.NDArray[np.int64]


class LengthTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Joint quantiles in tokens.

    ``prompt[i]`` is the ``prompt_at[i]``-quantile of the prompts; ``output[b][j]`` the ``output_at[j]``-quantile of
    the outputs whose prompt quantile lies between ``bins[b]`` and ``bins[b + 1]``.
    """

    name: str
    source: str
    prompt_at: list[float]
    prompt: list[float]
    bins: list[float]
    output_at: list[float]
    output: list[list[float]]

    def draw(self, requests: int, rng: np.random.Generator) -> tuple[Lengths, Lengths]:
        """Prompt and output tokens, shapes (requests,), each at least 1."""
        u = rng.random(requests)
        prompt = np.interp(u, self.prompt_at, self.prompt)
        bins = np.clip(np.searchsorted(self.bins, u, side="right") - 1, 0, len(self.output) - 1)
        v = rng.random(requests)
        output = np.empty(requests)
        for b, quantiles in enumerate(self.output):
            here = bins == b
            output[here] = np.interp(v[here], self.output_at, quantiles)
        return np.maximum(np.rint(prompt), 1).astype(np.int64), np.maximum(np.rint(output), 1).astype(np.int64)


def length_names() -> list[str]:
    """Names of the shipped length tables."""
    return sorted(path.stem for path in SHIPPED.glob("*.json"))


def load_lengths(name_or_path: str) -> LengthTable:
    """A shipped length table by name, or one from a JSON file.

    Raises:
        UnknownNameError: neither a shipped table nor a file.
        BadInputError: the file is not a length table.
    """
    path = SHIPPED / f"{name_or_path}.json"
    if not path.exists():
        path = Path(name_or_path)
        if not path.is_file():
            raise UnknownNameError("length table", name_or_path, length_names())
    try:
        return msgspec.json.decode(path.read_bytes(), type=LengthTable)
    except (msgspec.DecodeError, OSError) as error:
        raise BadInputError(f"{path} is not a length table: {error}.") from error


def table_of(prompt: npt.ArrayLike, output: npt.ArrayLike, *, name: str, source: str, bins: int = 32) -> LengthTable:
    """Fit a table to recorded lengths, shapes (n,) each, by plain quantiles.

    Raises:
        ConfigError: too few requests for so many bins.
    """
    prompts, outputs = np.asarray(prompt, dtype=float), np.asarray(output, dtype=float)
    if len(prompts) < 20 * bins:
        raise ConfigError(f"{len(prompts)} requests are too few for {bins} bins: give at least {20 * bins}.")
    tails = [0.001, 0.002, 0.005]
    prompt_at = np.unique(np.round([0.0, *tails, *np.linspace(0.01, 0.99, 197), *(1 - t for t in tails), 1.0], 6))
    output_at = np.unique(np.round([0.0, 0.005, *np.linspace(0.01, 0.99, 50), 0.995, 1.0], 6))
    edges = np.linspace(0, 1, bins + 1)
    order = np.argsort(prompts, kind="stable")
    parts = np.array_split(outputs[order], bins)
    return LengthTable(
        name=name, source=source,
        prompt_at=prompt_at.tolist(), prompt=np.round(np.quantile(prompts, prompt_at), 1).tolist(),
        bins=np.round(edges, 6).tolist(), output_at=output_at.tolist(),
        output=[np.round(np.quantile(part, output_at), 1).tolist() for part in parts],
    )  # fmt: skip
