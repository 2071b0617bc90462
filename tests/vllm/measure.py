"""Open-loop load on live servers, each request predicted just before it is sent; measured at the client."""

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import aiohttp

from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.sequence import Sequence as EngineSequence
from block.steptime.profile import StepTimeProfile


class Outcome(NamedTuple):
    """One request. Times are seconds from the moment it was sent; ``predicted``: what each predictor said."""

    server: str
    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None
    e2e_s: float | None
    chunks: int
    error: str | None
    predicted: Mapping[str, dict[str, Any]]
    sent_s: float = 0.0


async def offer(
    url: str,
    *,
    requests: int,
    rate_rps: float,
    seed: int,
    prompt: tuple[int, int],
    output: tuple[int, int],
    vocabulary: int = 400,
    predictors: Mapping[str, str] | None = None,
    server: str = "",
    endpoint: str = "/v1/completions",
) -> list[Outcome]:
    """Poisson arrivals of random prompts of ``prompt`` and answers of exactly ``output`` tokens (both inclusive
    ranges).

    ``predictors``: name -> URL; each is asked about a request just before it is sent.
    """
    chance = random.Random(seed)
    started_s, at_s = time.perf_counter(), 0.0
    tasks = []
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        for number in range(requests):
            at_s += chance.expovariate(rate_rps)
            words = chance.choices(range(5, vocabulary), k=chance.randint(*prompt))
            output_tokens = chance.randint(*output)
            await asyncio.sleep(started_s + at_s - time.perf_counter())
            key = f"{seed}-{number}"
            tasks.append(
                asyncio.create_task(_one(session, url, predictors or {}, server, endpoint, key, words, output_tokens))
            )
        return list(await asyncio.gather(*tasks))


async def _one(
    session: aiohttp.ClientSession,
    url: str,
    predictors: Mapping[str, str],
    server: str,
    endpoint: str,
    key: str,
    words: list[int],
    output_tokens: int,
) -> Outcome:
    predicted = {}
    question = {"prompt_tokens": len(words), "max_tokens": output_tokens, "output_tokens": output_tokens}
    for name, predictor in predictors.items():
        async with session.post(predictor + "/predict", json=question) as answer:
            if answer.status == 200:
                predicted[name] = await answer.json()
    body = {"model": "tiny", "prompt": words, "max_tokens": output_tokens, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    sent_s = time.perf_counter()
    ttft_s, chunks, told, done = None, 0, 0, False
    try:
        async with session.post(url + endpoint, json=body, headers={"X-Request-Id": key}) as response:
            if response.status != 200:
                return Outcome(
                    server,
                    len(words),
                    0,
                    None,
                    None,
                    0,
                    f"{response.status}: {(await response.text())[:200]}",
                    predicted,
                )
            if "x-predicted-ttft-ms" in response.headers:  # through a gateway
                names = {"ttft_s": "x-predicted-ttft-ms", "e2e_s": "x-predicted-e2e-ms"}
                predicted["gateway"] = {name: float(response.headers[h]) / 1e3 for name, h in names.items()}
            async for line in response.content:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    done = True
                    continue
                event = json.loads(line[6:])
                if event.get("error"):
                    return Outcome(server, len(words), told, ttft_s, None, chunks, str(event["error"])[:200], predicted)
                if event.get("choices"):
                    chunks += 1
                    ttft_s = ttft_s or time.perf_counter() - sent_s
                told = (event.get("usage") or {}).get("completion_tokens", told)
    except (aiohttp.ClientError, TimeoutError) as error:
        return Outcome(server, len(words), told, ttft_s, None, chunks, f"{type(error).__name__}: {error}", predicted)
    error = None if done else "the stream ended before [DONE]"
    return Outcome(server, len(words), told, ttft_s, time.perf_counter() - sent_s, chunks, error, predicted, sent_s)


def errors(outcomes: Sequence[Outcome], name: str) -> dict[str, float]:
    """How far one predictor is from what was measured: medians of absolute relative errors, and ratios of means."""
    pairs = [
        (o, o.predicted[name])
        for o in outcomes
        if o.error is None and name in o.predicted and o.ttft_s is not None and o.e2e_s is not None
    ]
    ttft = [(p["ttft_s"], o.ttft_s) for o, p in pairs if o.ttft_s]
    e2e = [(p["e2e_s"], o.e2e_s) for o, p in pairs if o.e2e_s]

    def error(values: list[tuple[float, float]], share: float) -> float:
        ordered = sorted(abs(p - m) / m for p, m in values)
        return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 4) if ordered else math.nan

    def ratio(values: list[tuple[float, float]]) -> float:
        return round(sum(p for p, _ in values) / sum(m for _, m in values), 4)

    return {
        "requests": len(pairs), "ttft_error_p50": error(ttft, 0.5), "ttft_error_p90": error(ttft, 0.9),
        "e2e_error_p50": error(e2e, 0.5), "e2e_error_p90": error(e2e, 0.9), "ttft_mean_ratio": ratio(ttft),
        "e2e_mean_ratio": ratio(e2e), "ttft_mean_s": round(statistics.fmean(m for _, m in ttft), 4),
        "e2e_mean_s": round(statistics.fmean(m for _, m in e2e), 4),
    }  # fmt: skip


def replayed(outcomes: Sequence[Outcome], limits: EngineLimits, profile: StepTimeProfile) -> list[Outcome]:
    """The same outcomes, with what the engine model makes of all their arrivals and lengths as the prediction (no
    feedback)."""
    engine = Engine(limits, profile.curve(1.0, limits))
    sequences = {}
    for number, outcome in enumerate(sorted((o for o in outcomes if o.error is None), key=lambda o: o.sent_s)):
        sequence = EngineSequence(
            number, outcome.prompt_tokens, outcome.output_tokens, order=float(number), arrived_s=outcome.sent_s
        )
        engine.add(sequence, outcome.sent_s + profile.input_s)
        sequences[number] = (outcome, sequence)
    engine.advance(float("inf"))
    return [
        outcome._replace(
            predicted={
                "model": {
                    "ttft_s": sequence.first_token_s - outcome.sent_s + profile.output_s,
                    "e2e_s": sequence.finished_s - outcome.sent_s + profile.output_s,
                }
            }
        )
        for outcome, sequence in sequences.values()
    ]
