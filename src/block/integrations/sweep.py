"""A short, closed-loop load that shows an engine's step times: batch sizes x contexts, single prefills, and both mixed.

The plan is data; playing it needs only an OpenAI endpoint that takes token ids. Prompts are random, so that a prefix
cache finds nothing.
"""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

import aiohttp
import msgspec

from block.engine.limits import EngineLimits
from block.errors import InstanceUnreachableError, UserError

Effort = Literal["gentle", "normal", "thorough"]
TOKEN_IDS: Final = range(20, 400)  # plain text in any vocabulary
KV_USED_MOST: Final = 0.85  # of the blocks, so that no request is preempted
ANSWER_S: Final = 300.0

# Of each effort: batch sizes, contexts, decode steps of each pair; single prefills of each length; seconds of mixed load.
_BATCHES: Final = {"gentle": 5, "normal": 8, "thorough": 14}
_CONTEXTS: Final = {"gentle": (64, 1024), "normal": (64, 512, 2048), "thorough": (64, 512, 2048, 6144)}
_DECODE_STEPS: Final = {"gentle": 30, "normal": 60, "thorough": 120}
_PREFILL_REPEATS: Final = {"gentle": 2, "normal": 4, "thorough": 8}
_MIXED_S: Final = {"gentle": 4.0, "normal": 10.0, "thorough": 30.0}


class SweepError(UserError):
    """The engine did not answer the sweep's requests."""


class Stage(NamedTuple):
    """``concurrency`` clients, each sending one request after another: ``rounds`` of them, or for ``seconds``.

    Lengths are drawn from these inclusive ranges.
    """

    title: str
    concurrency: int
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    rounds: int = 1
    seconds: float | None = None


class Answered(NamedTuple):
    """One request of a sweep, times in wall-clock seconds."""

    sent_s: float
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    e2e_s: float


def plan(limits: EngineLimits, effort: Effort) -> list[Stage]:
    """The stages that fit into an engine of these limits without preempting anything."""
    tokens_max = int(KV_USED_MOST * limits.blocks_usable) * limits.block_size
    steps = _DECODE_STEPS[effort]
    stages = []
    for batch in _spread(1, limits.max_num_seqs, _BATCHES[effort]):
        for context in _CONTEXTS[effort]:
            held = -(-(context + steps) // limits.block_size) * limits.block_size
            if context + steps < limits.max_model_len and batch * held <= tokens_max:
                stages.append(Stage(f"{batch} x {context} tokens", batch, (context, context), (steps, steps)))
    longest = min(limits.max_model_len - 4, tokens_max - 4, 16_384)
    repeats = _PREFILL_REPEATS[effort]
    lengths = _spread(16, longest, 10 if effort == "thorough" else 7)
    stages += [Stage(f"prefill of {length}", 1, (length, length), (3, 3), rounds=repeats) for length in lengths]
    for share in (0.08, 0.3, 0.8) if effort != "gentle" else (0.1, 0.5):
        prompts = (8, max(min(longest // 2, 1024), 8))
        most = tokens_max // (prompts[1] + 2 * steps)
        batch = max(min(int(share * limits.max_num_seqs), most), 1)
        stages.append(Stage(f"{batch} mixed", batch, prompts, (2, 2 * steps), seconds=_MIXED_S[effort]))
    return stages


def _spread(least: int, most: int, count: int) -> list[int]:
    """Integers from ``least`` to ``most``, evenly spaced in their logarithm."""
    if most <= least:
        return [least]
    ratio = (most / least) ** (1 / (count - 1))
    return sorted({round(least * ratio**i) for i in range(count)})


async def play(
    url: str,
    model: str,
    stages: Sequence[Stage],
    *,
    seed: int = 0,
    on_stage: Callable[[Stage], None] | None = None,
    headers: dict[str, str] | None = None,
) -> list[Answered]:
    """Run the stages one after another; returns every request's measurement.

    Raises:
        SweepError: a request was refused.
        InstanceUnreachableError: the engine cannot be reached.
    """
    chance = random.Random(seed)
    answered: list[Answered] = []
    timeout = aiohttp.ClientTimeout(total=ANSWER_S, sock_connect=10)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as session:
        for stage in stages:
            if on_stage is not None:
                on_stage(stage)
            try:
                async with asyncio.TaskGroup() as group:
                    clients = [
                        group.create_task(_client(session, url, model, stage, chance)) for _ in range(stage.concurrency)
                    ]
            except* (SweepError, InstanceUnreachableError) as errors:
                raise errors.exceptions[0] from None
            for client in clients:
                answered += client.result()
    return answered


async def _client(
    session: aiohttp.ClientSession, url: str, model: str, stage: Stage, chance: random.Random
) -> list[Answered]:
    ends_s = None if stage.seconds is None else time.monotonic() + stage.seconds
    answered: list[Answered] = []
    while len(answered) < stage.rounds if ends_s is None else time.monotonic() < ends_s:
        prompt = chance.choices(TOKEN_IDS, k=chance.randint(*stage.prompt_tokens))
        answered.append(await _ask(session, url, model, prompt, chance.randint(*stage.output_tokens)))
    return answered


async def _ask(session: aiohttp.ClientSession, url: str, model: str, prompt: list[int], output_tokens: int) -> Answered:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }
    sent_s, started_s, ttft_s = time.time(), time.perf_counter(), 0.0
    try:
        async with session.post(
            f"{url}/v1/completions", data=msgspec.json.encode(body), headers={"Content-Type": "application/json"}
        ) as answer:
            if answer.status != 200:
                raise SweepError(
                    f"{url} answered {answer.status} to a request of {len(prompt)} tokens: {(await answer.text())[:300]}"
                )
            async for line in answer.content:
                if not ttft_s and line.startswith(b"data:"):
                    ttft_s = time.perf_counter() - started_s
    except (aiohttp.ClientError, TimeoutError) as error:
        raise InstanceUnreachableError(f"{url}: {error or type(error).__name__}") from error
    return Answered(sent_s, len(prompt), output_tokens, ttft_s, time.perf_counter() - started_s)
