"""An open-loop client that knows what the right answer is."""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import NamedTuple

import aiohttp

from block.emulate import tokens

OUTPUT_TOKENS = 80
TIMEOUT_S = 25.0


class Outcome(NamedTuple):
    """One request. Times are monotonic seconds; ``began``: a byte of an answer body (or a status below 500) came."""

    sent_s: float
    ended_s: float
    stream: bool
    whole: bool
    began: bool
    what: str


def question(number: int, *, stream: bool) -> dict[str, object]:
    asked: dict[str, object] = {
        "model": "emulated", "prompt": f"question {number:06d} " + "what now " * 20, "max_tokens": OUTPUT_TOKENS,
        "temperature": 0, "ignore_eos": True, "stream": stream,
    }  # fmt: skip
    return asked


def right_answer(asked: dict[str, object]) -> str:
    """What the emulated engine answers to it, whichever one is asked."""
    return tokens.answer(tokens.answer_seed(tokens.of_text(str(asked["prompt"]))), 0, OUTPUT_TOKENS).decode()


async def drive(urls: Sequence[str], *, rate: float, seconds: float, stream_share: float = 0.5) -> list[Outcome]:
    """``rate`` requests a second for so long, evenly spaced, to the URLs in turn, whatever becomes of them; all outcomes, in order
    of sending."""
    started_s, tasks = time.monotonic(), []
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)) as session:
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, started_s + number / rate - time.monotonic()))
            stream = number * stream_share % 1.0 < stream_share
            tasks.append(asyncio.create_task(_ask(session, urls[number % len(urls)], question(number, stream=stream))))
        return list(await asyncio.gather(*tasks))


async def _ask(session: aiohttp.ClientSession, url: str, asked: dict[str, object]) -> Outcome:
    sent_s, began, text, what, stream = time.monotonic(), False, "", "", bool(asked["stream"])
    try:
        async with session.post(url + "/v1/completions", json=asked) as answer:
            if answer.status != 200:
                what = f"status {answer.status}"
            elif not stream:
                raw = await answer.read()
                text, began = json.loads(raw)["choices"][0]["text"], True
            else:
                async for line in answer.content:
                    began = True
                    if line.startswith(b'data: {"error"'):
                        what = "error event"
                    elif line.startswith(b"data: {"):
                        text += "".join(choice["text"] for choice in json.loads(line[5:])["choices"])
                    elif line.startswith(b"data: [DONE]"):
                        what = what or "done"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, KeyError) as error:
        what = type(error).__name__
    whole = text == right_answer(asked) and (not stream or what == "done")
    if not whole and not what:
        what = "wrong answer" if began else "no answer"
    return Outcome(sent_s, time.monotonic(), stream, whole, began, "" if whole else what)
