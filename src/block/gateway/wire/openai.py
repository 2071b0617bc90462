"""What the gateway reads of OpenAI's API: a few fields of a request, the usage in an answer, the shape of an error.

Bodies are never rewritten (but see `usage`, which is off by default).
Prompts are looked at for their length (and by length estimators that read text), never logged.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from block.core import Request
from block.errors import ClientError
from block.gateway.wire.headers import READ, client_of, priority_of, session_of, slo_of
from block.gateway.wire.http1 import HttpRequest
from block.length.prompt.text import chat_text
from block.policy.prefix import blocks_of

IMAGE_TOKENS: Final = 1000
GENERATING: Final = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
"""Paths whose answers are generated token by token: those get estimates and predictions."""

_NOTHING: Final = msgspec.Raw(b"")
_COMPLETION_TOKENS: Final = re.compile(rb'"(?:completion_tokens|output_tokens)"\s*:\s*(\d{1,9})')
_PROMPT_TOKENS: Final = re.compile(rb'"(?:prompt_tokens|input_tokens)"\s*:\s*(\d{1,9})')
_OSL: Final = re.compile(rb'"osl"\s*:\s*(\d{1,7})\b')
_IMAGE: Final = re.compile(rb'"data:[a-z]+/[^"]*"')


class Body(msgspec.Struct):
    """The fields that routing needs; everything else is skipped, not built."""

    model: str | None = None
    stream: bool | None = False
    prompt: msgspec.Raw = _NOTHING
    messages: msgspec.Raw = _NOTHING
    input: msgspec.Raw = _NOTHING
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_output_tokens: int | None = None
    ignore_eos: bool | None = False
    priority: int | None = None
    user: msgspec.Raw = _NOTHING
    previous_response_id: str | None = None
    nvext: msgspec.Raw = _NOTHING

    @property
    def output_limit(self) -> int | None:
        for limit in (self.max_completion_tokens, self.max_tokens, self.max_output_tokens):
            if limit is not None:
                return limit
        return None

    @property
    def text(self) -> msgspec.Raw:
        """The prompt as raw JSON, whichever field holds it."""
        for raw in (self.messages, self.prompt, self.input):
            if raw is not _NOTHING and bytes(raw) != b"null":
                return raw
        return _NOTHING

    @property
    def length_hint(self) -> int | None:
        """How long the client expects the answer to be, tokens, as Dynamo's ``nvext.agent_hints.osl`` says it."""
        found = None if self.nvext is _NOTHING else _OSL.search(bytes(self.nvext))
        return None if found is None else max(1, int(found[1]))

    @property
    def sender(self) -> bytes:
        """The application's name for its own user, as raw JSON; empty where it gives none."""
        user = bytes(self.user)
        return b"" if user in (b"null", b'""') else user


_decoder: Final = msgspec.json.Decoder(Body, strict=False)
"""Takes ``"16"`` and ``16.0`` for 16, as engines do (pydantic): what they would answer must not be refused here."""


def read_body(body: bytes) -> Body:
    """The fields of a request body.

    Raises:
        ClientError: 400, not JSON, not an object, or a field of the wrong type.
    """
    try:
        return _decoder.decode(body)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        param = where.strip("`").removeprefix("$.") or None
        raise ClientError(
            400,
            f"The request is not valid: {what[:1].lower()}{what[1:]}{f' in {param!r}' if param else ''}.",
            param=param,
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ClientError(400, f"The request body is not valid JSON: {error}.", code="invalid_json") from None


class PromptRatio:
    """Bytes of prompt per token, per model, learned from the usage in answers; bounded to ``MODELS_MAX`` models."""

    START: Final = 4.0
    MODELS_MAX: Final = 256

    def __init__(self) -> None:
        self._ratio: dict[str, float] = {}

    def of(self, model: str) -> float:
        return self._ratio.get(model, self.START)

    def observe(self, model: str, prompt_bytes: int, prompt_tokens: int) -> None:
        """Learn from one answer; short prompts are mostly chat template and say little."""
        if prompt_tokens < 16 or prompt_bytes < 32:
            return
        ratio = min(max(prompt_bytes / prompt_tokens, 0.5), 16.0)
        if model in self._ratio:
            self._ratio[model] += 0.05 * (ratio - self._ratio[model])
        elif len(self._ratio) < self.MODELS_MAX:
            self._ratio[model] = ratio


def prompt_size(raw: msgspec.Raw) -> tuple[int, int]:
    """(bytes of text to estimate tokens from, tokens known exactly) of a prompt, messages or input field."""
    text = bytes(raw)
    if not text or text[:1] == b'"':
        return max(len(text) - 2, 0), 0
    inner = text[1:64].lstrip()
    if text[:1] == b"[" and inner[:1].isdigit():
        return 0, text.count(b",") + 1
    if text[:1] == b"[" and inner[:1] == b"[":
        return 0, text.count(b",") + 1
    images = 0
    if b'"data:' in text:
        text, images = _IMAGE.subn(b'""', text)
    return len(text), images * IMAGE_TOKENS


def prompt_text(raw: msgspec.Raw) -> str | None:
    """The prompt's text for estimators that read it; ``None`` where it is token ids or not understood."""
    try:
        value: Any = msgspec.json.decode(raw) if raw is not _NOTHING else None
    except (msgspec.DecodeError, RecursionError):
        return None
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return None
    if value and isinstance(value[0], dict):
        return chat_text(value) or None
    parts = [item for item in value if isinstance(item, str)]
    return "\n".join(parts) if parts else None


def as_request(
    http: HttpRequest, body: Body, *, request_id: str, arrived_s: float, ratio: PromptRatio, reads_text: bool,
    objectives: Mapping[str, int], key_name: str | None = None, reads_prefix: bool = False,
) -> tuple[Request, int]:  # fmt: skip
    """The core's view of a request, and the bytes of its prompt text. ``objectives``: their priorities, by name.

    Raises:
        ClientError: 400, an SLO or priority header that is no number.
    """
    raw = body.text
    text_bytes, known = prompt_size(raw)
    model = body.model or ""
    plain = READ.isdisjoint(http.fields)
    prompt_tokens = max(1, known + round(text_bytes / ratio.of(model)))
    request = Request(
        id=request_id,
        arrived_s=arrived_s,
        prompt_tokens=prompt_tokens,
        max_tokens=None if (limit := body.output_limit) is None else max(1, limit),
        exact_output=bool(body.ignore_eos) and limit is not None,
        model=model,
        priority=body.priority or 0 if plain or body.priority is not None else priority_of(http, objectives),
        slo=None if plain else slo_of(http),
        session=None if plain else session_of(http),
        client=None if plain and key_name is None and not body.user else client_of(http, body.sender, key_name),
        prompt=prompt_text(raw) if reads_text else None,
        blocks=blocks_of(bytes(raw), prompt_tokens, model) if reads_prefix else None,
    )
    return request, text_bytes


def usage_of(tail: bytes) -> tuple[int | None, int | None]:
    """(prompt tokens, output tokens) from the last usage object in an answer's last bytes, where there is one."""
    at = tail.rfind(b'"usage"')
    if at < 0:
        return None, None
    prompt, completion = _PROMPT_TOKENS.search(tail, at), _COMPLETION_TOKENS.search(tail, at)
    return (int(prompt[1]) if prompt else None, int(completion[1]) if completion else None)


def error_object(message: str, kind: str, code: str | None, param: str | None) -> bytes:
    """OpenAI's error object as JSON."""
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": param, "code": code}})
