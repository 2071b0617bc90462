"""``--predict remote``: every predictor is asked over HTTP (the published layout), with one deadline for all."""

import asyncio
from collections.abc import Sequence

import aiohttp
import msgspec

from block.core import InstanceId, Prediction, Request
from block.gateway.members.pool import Pool


class RemotePredictors:
    """Asks the predictors of some instances about one request. What does not come in time is ``None``."""

    def __init__(self, pool: Pool, session: aiohttp.ClientSession, timeout_s: float) -> None:
        self._pool, self._session, self._timeout_s = pool, session, timeout_s

    async def ask(self, ids: Sequence[InstanceId], request: Request, output_tokens: int) -> list[Prediction | None]:
        """One answer per instance, in their order."""
        question: dict[str, int] = {"prompt_tokens": request.prompt_tokens, "output_tokens": output_tokens}
        if request.max_tokens is not None:
            question["max_tokens"] = request.max_tokens
        body = msgspec.json.encode(question)
        return list(await asyncio.gather(*(self._ask_one(i, body) for i in ids)))

    async def _ask_one(self, instance_id: InstanceId, body: bytes) -> Prediction | None:
        instance = self._pool.instances.get(instance_id)
        if instance is None or instance.config.predictor is None:
            return None
        url = f"{instance.config.predictor.rstrip('/')}/predict"
        headers = {"content-type": "application/json"}
        try:
            async with self._session.post(
                url,
                data=body,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=self._timeout_s),
                allow_redirects=False,
            ) as answer:
                return (
                    msgspec.json.decode(await answer.content.read(65536), type=Prediction)
                    if answer.status == 200
                    else None
                )
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError, ValueError):
            return None
