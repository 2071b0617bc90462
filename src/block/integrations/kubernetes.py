"""The Kubernetes API through its official asynchronous client: who we are and how to reach it is the client's business, paths
and JSON are as the API documents them (so that built-in and custom resources are the same to us)."""

import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

import aiohttp

from block.errors import ActuatorError, ConfigError

MERGE_PATCH: Final = "application/merge-patch+json"
EVENT_BYTES_MAX: Final = 8 << 20


class Api:
    """GET, PATCH and the like on paths. Every call ends within ``timeout_s``."""

    def __init__(self, client: Any, timeout_s: float) -> None:
        self._client, self._timeout_s = client, timeout_s

    async def get(self, path: str, **query: str) -> dict[str, Any]:
        """Raises ActuatorError: no answer, or a refusal."""
        return await self._call("GET", path, query=query)

    async def patch(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """A merge patch. Raises ActuatorError: no answer, or a refusal."""
        return await self._call("PATCH", path, body=body, content_type=MERGE_PATCH)

    async def send(self, method: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST or PUT. Raises ActuatorError: no answer, or a refusal (409 is ``ConflictError``)."""
        return await self._call(method, path, body=body)

    async def watch(self, path: str, within_s: float, **query: str) -> AsyncGenerator[dict[str, Any], None]:
        """Events of a list, as they come, for ``within_s`` at most.

        Raises:
            ActuatorError: no answer, a refusal, or an end in the middle.
        """
        query |= {"watch": "true", "timeoutSeconds": str(max(1, int(within_s)))}
        answer = await self._open("GET", path, query, None, "application/json", within_s + self._timeout_s)
        rest = b""
        try:
            async for part in answer.content.iter_any():
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield json.loads(line)
                if len(rest) > EVENT_BYTES_MAX:
                    raise ActuatorError(f"The Kubernetes API sent an event of more than {EVENT_BYTES_MAX} bytes.")
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise ActuatorError(f"The Kubernetes API broke off its answer to {path}: {error!r}") from error
        finally:
            answer.close()

    async def close(self) -> None:
        await self._client.close()

    async def _call(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: Any = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:  # fmt: skip
        answer = await self._open(method, path, query or {}, body, content_type, self._timeout_s)
        try:
            told = json.loads(await answer.read())
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise ActuatorError(f"The Kubernetes API did not answer {method} {path}: {error!r}") from error
        if not isinstance(told, dict):
            raise ActuatorError(f"The Kubernetes API answered {method} {path} with something else than an object.")
        if told.get("kind") == "Status" and told.get("status") == "Failure":
            raise ActuatorError(f"The Kubernetes API refused {method} {path}: {told.get('message')}")
        return told

    async def _open(
        self, method: str, path: str, query: Mapping[str, str], body: Any, content_type: str, timeout_s: float
    ) -> Any:
        """An answer whose head has come and is no refusal."""
        from kubernetes_asyncio.client import ApiException

        headers = {"Accept": "application/json", "Content-Type": content_type}
        try:
            answer = await self._client.call_api(
                path, method, query_params=list(query.items()), header_params=headers, body=body,
                auth_settings=["BearerToken"], _preload_content=False, _request_timeout=timeout_s,
                _return_http_data_only=True,
            )  # fmt: skip
            if answer.status >= 400:
                raise _refusal(method, path, answer.status, await answer.text())
        except ApiException as error:
            raise _refusal(method, path, error.status, error.body or error.reason) from error
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise ActuatorError(f"The Kubernetes API did not answer {method} {path}: {error!r}") from error
        return answer


class ConflictError(ActuatorError):
    """The object was changed by somebody else, or is there already."""


async def connect(kubeconfig: str | None, context: str | None, timeout_s: float) -> Api:
    """To the cluster of a kubeconfig file; without one, of the pod that this runs in, else of the user's own configuration.

    Raises:
        ConfigError: the client's package is missing, or there is no configuration.
    """
    try:
        from kubernetes_asyncio import client, config
    except ImportError as error:
        raise ConfigError("Kubernetes needs another package: pip install 'block-llm[kubernetes]'.") from error
    settings = client.Configuration()
    try:
        if kubeconfig is None and context is None:
            try:
                config.load_incluster_config(client_configuration=settings)  # type: ignore[no-untyped-call]
            except config.ConfigException:
                await config.load_kube_config(client_configuration=settings)
        else:
            await config.load_kube_config(config_file=kubeconfig, context=context, client_configuration=settings)
    except (config.ConfigException, OSError) as error:
        raise ConfigError(f"There is no Kubernetes configuration to be had: {error}.") from error
    return Api(client.ApiClient(settings), timeout_s)


def _refusal(method: str, path: str, status: int, body: Any) -> ActuatorError:
    try:
        said = str(json.loads(body)["message"])
    except (TypeError, ValueError, KeyError):
        said = str(body)[:200]
    kind = ConflictError if status == 409 else ActuatorError
    return kind(f"The Kubernetes API refused {method} {path}: {status} {said}")
