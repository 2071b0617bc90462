"""Made-up logs whose lengths follow from the prompt in a known way, for tests of learning."""

import numpy as np

from block.length.data.records import Record

KINDS = {"Explain": 300, "Name": 15, "Translate": 40, "Write an essay about": 700, "Sum up": 80}
TOPICS = [
    "rivers",
    "bread",
    "glass",
    "law",
    "trains",
    "moss",
    "rust",
    "tides",
    "ink",
    "salt",
    "maps",
    "kites",
    "bees",
    "coal",
    "jazz",
]
PLACES = [
    "Rome",
    "Oslo",
    "Lima",
    "Cairo",
    "Delhi",
    "Kyoto",
    "Quito",
    "Perth",
    "Tunis",
    "Riga",
    "Cork",
    "Bern",
    "Graz",
    "Lyon",
    "Bari",
]


def made_up(count: int, *, seed: int = 0, models: dict[str, float] | None = None, noise: float = 0.3) -> list[Record]:
    """Each kind of prompt has a median length, each model a factor; noise is log-normal."""
    rng = np.random.default_rng(seed)
    factors = models or {"m": 1.0}
    records = []
    for _ in range(count):
        kind = list(KINDS)[rng.integers(len(KINDS))]
        topic, place = TOPICS[rng.integers(len(TOPICS))], PLACES[rng.integers(len(PLACES))]
        model = list(factors)[rng.integers(len(factors))]
        tokens = KINDS[kind] * factors[model] * np.exp(noise * rng.standard_normal())
        text = (
            f"{kind} {topic} near {place} {TOPICS[rng.integers(len(TOPICS))]} and {PLACES[rng.integers(len(PLACES))]}"
        )
        records.append(Record(text=text, output_tokens=max(1, round(tokens)), model=model, dataset="made-up"))
    return records
