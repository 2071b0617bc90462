"""OpenAI's requests and answers, in vLLM's dialect: parsing bodies, formatting objects, error objects. Pure."""

from typing import Any, Final

import msgspec

from block.emulate import tokens
from block.errors import ClientError

COMPLETION_MAX_TOKENS: Final = 16  # OpenAI's (and vLLM's) default of /v1/completions


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str | list[Any] | None = None
    tool_calls: list[Any] | None = None


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    """Fields that both kinds share; unknown ones are ignored, as vLLM does."""

    model: str | None = None
    max_tokens: int | msgspec.UnsetType | None = msgspec.UNSET
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    seed: int | None = None
    return_token_ids: bool | None = None


class CompletionBody(_Body, frozen=True, kw_only=True):
    prompt: str | list[Any]


class ChatBody(_Body, frozen=True, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    tools: list[Any] | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A checked request. ``prompt``: a token sequence (``emulate.tokens``); ``exact_output``: ``ignore_eos`` is set;
    ``token_ids``: they are told, the prompt's too (``return_token_ids``)."""

    chat: bool
    model: str | None
    prompt: bytes
    max_tokens: int | None
    exact_output: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    priority: int
    cache_salt: str
    seed: int = 0
    token_ids: bool = False

    @property
    def prompt_tokens(self) -> int:
        return tokens.count(self.prompt)

    @property
    def answer_seed(self) -> int:
        """What its answer's tokens are made of (see ``tokens.word``)."""
        return tokens.answer_seed(self.prompt, self.seed)


def bad_request(message: str, param: str | None = None) -> ClientError:
    return ClientError(400, message, kind="BadRequestError", param=param)


_COMPLETION: Final = msgspec.json.Decoder(CompletionBody)
_CHAT: Final = msgspec.json.Decoder(ChatBody)


def parse_completion(raw: bytes) -> Job:
    """The job of a ``/v1/completions`` body.

    Raises:
        ClientError: malformed JSON, or a field that is missing, of the wrong type, or not served here.
    """
    body: CompletionBody = _decode(_COMPLETION, raw)
    # An explicit null means as much as fits.
    max_tokens = COMPLETION_MAX_TOKENS if body.max_tokens is msgspec.UNSET else body.max_tokens
    return _job(body, False, prompt_of(body.prompt), max_tokens, "max_tokens")


def parse_chat(raw: bytes) -> Job:
    """The job of a ``/v1/chat/completions`` body; raises like ``parse_completion``."""
    body: ChatBody = _decode(_CHAT, raw)
    if not body.messages:
        raise bad_request("messages must not be empty.", "messages")
    messages = [(m.role, message_text(m)) for m in body.messages]
    if body.tools:
        messages.insert(0, ("tools", msgspec.json.encode(body.tools).decode()))
    prompt = tokens.of_chat(messages)
    named = body.max_completion_tokens is not None
    max_tokens = body.max_completion_tokens if named else body.max_tokens
    if max_tokens is msgspec.UNSET:
        max_tokens = None
    return _job(body, True, prompt, max_tokens, "max_completion_tokens" if named else "max_tokens")


def prompt_of(prompt: str | list[Any]) -> bytes:
    """The tokens of a completion's prompt: text, token ids, or a list of exactly one of these.

    Raises:
        ClientError: empty, several prompts, or not of these types.
    """
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise bad_request(
                "Several prompts in one request are not supported by this server: send them one by one.", "prompt"
            )
        prompt = prompt[0]
    if not prompt:
        raise bad_request("The prompt must not be empty.", "prompt")
    if isinstance(prompt, str):
        return tokens.of_text(prompt)
    try:
        return tokens.of_ids(prompt)
    except ValueError as error:
        raise bad_request(f"prompt: {error}.", "prompt") from error


def message_text(message: Message) -> str:
    """The text of a message: its text parts (images, audio and the like count nothing), its tool calls as JSON."""
    text = message.content or ""
    if isinstance(text, list):
        texts = [part if isinstance(part, str) else part.get("text") for part in text if isinstance(part, str | dict)]
        text = "\n".join(t for t in texts if isinstance(t, str))
    if message.tool_calls:
        text += msgspec.json.encode(message.tool_calls).decode()
    return text


def _decode(decoder: Any, raw: bytes) -> Any:
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise bad_request(f"{error}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"The body is not valid JSON: {error}.") from error


def _job(body: _Body, chat: bool, prompt: bytes, max_tokens: int | None, max_tokens_name: str) -> Job:
    if body.n not in (None, 1) or body.best_of not in (None, 1):
        raise bad_request("Only n = 1 (one choice a request) is supported by this server.", "n")
    if max_tokens is not None and max_tokens < 1:
        raise bad_request(f"{max_tokens_name} must be at least 1, got {max_tokens}.", max_tokens_name)
    if body.stream_options is not None and not body.stream:
        raise bad_request("Stream options can only be defined when `stream=True`.", "stream_options")
    options = body.stream_options or StreamOptions()
    return Job(
        chat=chat,
        model=body.model,
        prompt=prompt,
        max_tokens=max_tokens,
        exact_output=bool(body.ignore_eos),
        stream=bool(body.stream),
        include_usage=bool(options.include_usage),
        continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        seed=body.seed or 0,
        token_ids=bool(body.return_token_ids),
    )
