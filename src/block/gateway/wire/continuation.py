"""One streamed answer written down as token ids, so that another instance can go on with it where the first one died.

Theory of operation. The instance is asked to tell the ids of the prompt's and the answer's tokens (``return_token_ids``, as
vLLM has it); they are kept, four bytes a token, and taken out of the events again. When the instance dies, the rest
is asked of another one: a completion whose prompt is the prompt's and the answer's ids so far, with so much less to generate. Its
events are rewritten: the ids, the time and the model of the first answer, a chat's shape for a chat, the usage of the whole.

That is exact where the next token depends on the tokens before it and on nothing else: greedy answers come out as they
would have, sampled ones from the same distribution; an engine draws anew for the rest of a seeded one. A token that is half a
character shows as nothing until the other half is there: the last ones that showed as nothing are generated again. What an
engine remembers besides tokens is lost with it: half a stop string, the state of a grammar, counts for penalties on the output.
So there is a list of what a request may ask for (``ASKED``), and whatever is not on it is not continued.
"""

import re
from array import array
from collections.abc import Mapping
from typing import Any, Final

import httptools
import msgspec

from block.core import Request
from block.gateway.wire.http1 import LAST_CHUNK, chunk
from block.gateway.wire.relay import is_one_chunk

COMPLETIONS: Final = b"/v1/completions"
CHAT: Final = b"/v1/chat/completions"
TOKENS_MAX: Final = 1 << 18  # of the prompt and the answer together: a megabyte
HELD_BYTES_MAX: Final = 4 << 20  # of one event; the first one tells the prompt's ids
COMPLETION_MAX_TOKENS: Final = 16  # the API's default of a completion

_ANY: Final = frozenset({"*"})
_OFF: Final = frozenset({"null", "false", "0", "0.0", "[]", '""', "{}"})
ASKED: Final[Mapping[str, frozenset[str]]] = {
    "model": _ANY, "stream": _ANY, "stream_options": _ANY, "user": _ANY, "priority": _ANY, "cache_salt": _ANY,
    "max_tokens": _ANY, "min_tokens": _ANY, "ignore_eos": _ANY, "stop_token_ids": _ANY, "return_token_ids": _ANY,
    "temperature": _ANY, "top_p": _ANY, "top_k": _ANY, "min_p": _ANY, "seed": _ANY, "logit_bias": _ANY,
    "repetition_penalty": _ANY, "skip_special_tokens": _ANY, "spaces_between_special_tokens": _ANY,
    "n": frozenset({"1", "null"}), "best_of": frozenset({"1", "null"}),
    "presence_penalty": _OFF, "frequency_penalty": _OFF, "stop": _OFF, "echo": _OFF, "suffix": _OFF,
    "logprobs": frozenset({"null", "false"}),
    "tools": _OFF, "response_format": frozenset({"null", '{"type":"text"}', '{"type": "text"}'}), "store": _OFF, "metadata": _ANY,
}  # fmt: skip
"""Fields of a request whose answer can be continued, and the values they may have (any, or as if not given)."""
LIMITS: Final = frozenset({"max_tokens", "min_tokens", "max_completion_tokens"})
"""Numbers that are counted down; where they are written oddly (as a string) nothing is continued."""
_PROMPT_FIELDS: Final[Mapping[bytes, frozenset[str]]] = {
    COMPLETIONS: frozenset({"prompt", "add_special_tokens"}),
    CHAT: frozenset(
        {"messages", "max_completion_tokens", "add_special_tokens", "add_generation_prompt", "chat_template",
         "chat_template_kwargs", "continue_final_message", "documents"}
    ),
}  # fmt: skip
"""What the prompt is made of, which its token ids replace."""
_NOT_CONTINUED: Final = (
    "echo",
    "suffix",
    "logprobs",
    "best_of",
    "tools",
    "response_format",
    "store",
    "metadata",
    "stop",
)
"""Left out of what another instance is asked: without effect here, and a completion may not know them."""

_IDS: Final = re.compile(rb'"token_ids"\s*:\s*(\[[\d,\s]*\])')
_PROMPT_IDS: Final = re.compile(rb'"prompt_token_ids"\s*:\s*(\[[\d,\s]*\])')
_FINISH: Final = re.compile(rb'"finish_reason"\s*:\s*"(\w*)"')
_EMPTY: Final = re.compile(rb'"(?:text|content)"\s*:\s*""')
_NO_TEXT: Final = b'"text":""'
_NO_CONTENT: Final = b'"content":""'
_IDS_PLAIN: Final = b'"token_ids":['
_GOES_ON: Final = b'"finish_reason":null'
_ENGINE_GAVE_UP: Final = (b"abort", b"error")
_BESIDES_TEXT: Final = re.compile(rb'"(?:tool_calls|function_call|reasoning|reasoning_content)"\s*:\s*(?!null|\[\s*\])')
_AT_ITS_LIMIT: Final = b'data: {"choices":[{"index":0,"text":"","logprobs":null,"finish_reason":"length"}]}'
_TRUE: Final = msgspec.Raw(b"true")
_encode: Final = msgspec.json.encode
_decode_fields: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Tape:
    """Of one request; outlives the instances that answer it. ``feed`` takes an answer's bytes and gives the client's.

    ``tokens`` and ``prompt_tokens`` are those of the answer under way (as ``usage.UsageStrip`` has them), ``count`` counts
    the tokens of all. ``broken``: the instance itself gave up; nothing of that went to the client.
    """

    __slots__ = (
        "_chat", "_done", "_fields", "_first", "_held", "_ids", "_parser", "_prompt", "_shown", "_text", "_unseen", "_usage_told",
        "_usual", "_whole", "attempts", "before", "broke_s", "broken", "chunked", "finished", "problem", "prompt_tokens", "request",
    )  # fmt: skip

    def __init__(self, request: Request, fields: dict[str, msgspec.Raw], *, chat: bool) -> None:
        self.request = request
        self.problem: str | None = None
        """Why this answer cannot be continued."""
        self.attempts = 0
        """How often it was."""
        self.broke_s = 0.0
        """Loop time at which its last instance died, while nobody else has it."""
        self.before = 0
        """Tokens from instances that are gone."""
        self.chunked = True
        self._fields, self._chat = fields, chat
        self._shown = bytes(fields.get("return_token_ids", b"")) == b"true"
        self._prompt = array("I")
        self._ids = array("I")
        self._unseen = 0
        """Of those at the end, how many the client has seen nothing of: engines keep back half a character."""
        self._first: bytes | None = None
        self._usage_told = self._done = self.finished = False
        self.begin()

    def begin(self) -> None:
        """Another answer comes: what its bytes are fed to begins anew."""
        self.broken = self._whole = self._usual = False
        self.prompt_tokens: int | None = None
        self._held = b""
        self._text: list[bytes] = []
        self._parser = httptools.HttpResponseParser(self)
        self._parser.feed_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")

    @property
    def count(self) -> int:
        return len(self._ids)

    @property
    def tokens(self) -> int | None:
        return None if self.problem is not None else len(self._ids) - self.before

    @property
    def begun(self) -> bool:
        """An event went to the client."""
        return self._first is not None

    @property
    def can_continue(self) -> bool:
        return self.problem is None and (not self.begun or bool(self._prompt))

    # What to ask

    def target_and_body(self, target: bytes) -> tuple[bytes, bytes]:
        """What to send: the client's own request with the ids asked for, or a completion of the rest."""
        if not self.begun:
            return target, _encode(self._fields | {"return_token_ids": _TRUE})
        fields: dict[str, Any] = {
            name: raw
            for name, raw in self._fields.items()
            if name not in _PROMPT_FIELDS[CHAT if self._chat else COMPLETIONS] and name not in _NOT_CONTINUED
        }
        fields |= {"prompt": (self._prompt + self._ids).tolist(), "max_tokens": self.left, "return_token_ids": True}
        if (least := _number(self._fields.get("min_tokens"))) is not None:
            fields["min_tokens"] = max(0, least - self.count)
        return COMPLETIONS + target[target.find(b"?") :] if b"?" in target else COMPLETIONS, _encode(fields)

    @property
    def complete(self) -> bool:
        """All its tokens came, whatever else may be missing."""
        return self.finished or (self._left == 0 and not self._unseen)

    @property
    def left(self) -> int | None:
        """Tokens to ask for; ``None``: as many as fit."""
        return None if self._left is None else max(1, self._left)

    @property
    def _left(self) -> int | None:
        most = _number(self._fields.get("max_tokens"))
        if self._chat:
            most = _number(self._fields.get("max_completion_tokens")) or most
        elif "max_tokens" not in self._fields:
            most = COMPLETION_MAX_TOKENS
        return None if most is None else max(0, most - self.count)

    def rest(self) -> bytes:
        """Bytes behind the last whole event (a stream that is not chunked is not written down)."""
        return b""

    def again(self, now_s: float) -> Request:
        """Its instance is gone: the request for the rest."""
        self.attempts += 1
        self.broke_s = now_s
        if self._unseen:  # what they say of their half of a character would get lost: let them be generated again
            del self._ids[-self._unseen :]
            self._unseen = 0
        self.before = self.count
        self.begin()
        prompt = len(self._prompt) + self.count if self._prompt else self.request.prompt_tokens
        return msgspec.structs.replace(self.request, prompt_tokens=max(1, prompt), max_tokens=self.left)

    # What came

    def feed(self, data: bytes) -> bytes:
        """The client's bytes for these of the instance, in whole events."""
        if self._usual and not self._held and is_one_chunk(data):
            out = self._one_event(data)
            if out is not None:
                return out
        self._text = []
        self._parser.feed_data(data)
        text = self._held + b"".join(self._text)
        if self.problem is None or self.before:
            text = self._events(text)
        else:
            self._held = b""
        if self.broken:
            return chunk(text) if text else b""
        return (chunk(text) if text else b"") + (LAST_CHUNK if self._whole else b"")

    def _one_event(self, data: bytes) -> bytes | None:
        """The usual case in the middle of an answer, done cheaply: a chunk with one event of text; ``None``: it is not that."""
        at = data.find(_IDS_PLAIN)
        if at < 0 or _GOES_ON not in data or data.count(b"\n\n") != 1 or not data.endswith(b"\n\n\r\n"):
            return None
        if self._chat and (
            b'"content"' not in data or b"tool_calls" in data or b"reasoning" in data or b"function_" in data
        ):
            return None
        first = at + len(_IDS_PLAIN)
        end = data.find(b"]", first)
        ids = data[first:end]
        if not ids.isdigit():
            return None
        self._ids.append(int(ids))
        if not self._shown:
            self._unseen = self._unseen + 1 if (_NO_CONTENT if self._chat else _NO_TEXT) in data else 0
        self._usual = len(self._prompt) + len(self._ids) < TOKENS_MAX
        return data if self._shown else chunk(data[data.find(b"\n") + 1 : first - 1] + b"null" + data[end + 1 : -2])

    def _events(self, text: bytes) -> bytes:
        *events, self._held = text.split(b"\n\n")
        out = b"".join([event + b"\n\n" for event in map(self._take, events) if event])
        if self._whole and not self.broken:
            if not (self.finished or self._done) and self.can_continue:
                self.broken = True  # it ended well-formed and is not whole
            else:
                out += self._held
        elif len(self._held) > HELD_BYTES_MAX or (self._held and self.problem is not None and not self.before):
            self.problem = self.problem or "an event is too large to be kept"
            out, self._held = out + self._held, b""
        return out

    def _take(self, event: bytes) -> bytes | None:
        """One event on its way to the client; ``None``: it does not get it."""
        if self.broken:
            return None
        if not event.startswith(b"data: {"):
            self._done = self._done or event.startswith(b"data: [DONE]")
            return event
        finish = _FINISH.search(event)
        if self.can_continue and (
            event.startswith(b'data: {"error"') or (finish is not None and finish[1] in _ENGINE_GAVE_UP)
        ):
            self.broken = True
            return None
        self.finished = self.finished or finish is not None
        found = _IDS.search(event)
        if found is not None:
            if found[1] != b"[]":
                ids = [int(one) for one in found[1][1:-1].split(b",")]
                self._ids.extend(ids)
                if not self._shown:
                    self._unseen = self._unseen + len(ids) if _EMPTY.search(event) and not self.finished else 0
            event = event if self._shown else _without(event, found)
        elif self.problem is None and b'"role"' not in event and b'"choices":[]' not in event:
            self.problem = "its instance does not tell token ids"
        if self.before:
            return self._rewritten(event)
        self._usage_told = self._usage_told or b'"choices":[]' in event
        return self._looked_at(event, found is not None)

    def _looked_at(self, event: bytes, has_tokens: bool) -> bytes:
        """Of the answer's first instance: what has to be known of it; the event as it goes to the client."""
        if self._first is None:
            prompt = _PROMPT_IDS.search(event)
            if prompt is not None and prompt[1] != b"[]":
                self._prompt.extend(map(int, prompt[1][1:-1].split(b",")))
                self.prompt_tokens = len(self._prompt)
                event = event if self._shown else _without(event, prompt)
            self._first = event
        if len(self._prompt) + len(self._ids) > TOKENS_MAX:
            self.problem = f"it has more than {TOKENS_MAX} tokens"
        elif not self._prompt:
            self.problem = self.problem or "its instance does not tell the prompt's token ids"
        elif self._chat and (
            _BESIDES_TEXT.search(event) or (has_tokens and b'"content"' not in event and not self.finished)
        ):
            self.problem = "it is more than text"
        self._usual = self.problem is None
        if self.problem is not None:
            self._prompt, self._ids = array("I"), array("I")
        return event

    # An answer that goes on

    def _rewritten(self, event: bytes) -> bytes | None:
        """An event of another answer's as one of this."""
        try:
            value = msgspec.json.decode(event[5:])
            choices, usage = value["choices"], value.get("usage")
            first = msgspec.json.decode((self._first or b"data: {}")[5:])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, LookupError, TypeError, AttributeError):
            return event
        shown = {name: member for name, member in first.items() if name not in ("choices", "usage", "prompt_token_ids")}
        shown["choices"] = [self._choice(choice) for choice in choices]
        if usage is not None:
            self._usage_told = self._usage_told or not choices
            shown["usage"] = self._usage(usage)
        elif "usage" in value:
            shown["usage"] = None
        return b"data: " + msgspec.json.encode(shown)

    def _choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        choice = {name: member for name, member in choice.items() if name != "prompt_token_ids"}
        if not self._shown:
            choice.pop("token_ids", None)
        if not self._chat:
            return choice
        text = choice.pop("text", "")
        return {"index": choice.pop("index", 0), "delta": {"content": text} if text else {}} | choice

    def _usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Of the whole answer, as its first instance would have said."""
        prompt, output = len(self._prompt), self.count
        if self.problem is not None:  # this instance tells no ids: it counts its own
            output = self.before + int(usage.get("completion_tokens") or 0)
        return {"prompt_tokens": prompt, "total_tokens": prompt + output, "completion_tokens": output}

    def end(self) -> bytes:
        """What is missing of an answer whose last token came before its instance died."""
        events = b""
        if not self.finished:
            events = (self._rewritten(_AT_ITS_LIMIT) or b"") + b"\n\n"
        options = bytes(self._fields.get("stream_options", b""))
        if b'"include_usage":true' in options.replace(b" ", b"") and not self._usage_told and self._prompt:
            first = msgspec.json.decode((self._first or b"data: {}")[5:])
            shown = {
                name: member for name, member in first.items() if name not in ("choices", "usage", "prompt_token_ids")
            }
            events += b"data: " + msgspec.json.encode(shown | {"choices": [], "usage": self._usage({})}) + b"\n\n"
        if not self._done:
            events += b"data: [DONE]\n\n"
        return (chunk(events) if events else b"") + LAST_CHUNK

    # Callbacks of httptools

    def on_body(self, body: bytes) -> None:
        self._text.append(body)

    def on_message_complete(self) -> None:
        self._whole = True


def tape_of(target: bytes, body: bytes, request: Request) -> Tape | None:
    """A tape for a streamed request; ``None``: its answer could not be continued exactly. ``body`` was read before."""
    path = target.partition(b"?")[0]
    of_prompt = _PROMPT_FIELDS.get(path)
    if of_prompt is None:
        return None
    fields = _decode_fields(body)
    for name, raw in fields.items():
        if name in LIMITS and not (bytes(raw).isdigit() or bytes(raw) == b"null"):
            return None
        if name in of_prompt:
            continue
        allowed = ASKED.get(name)
        if allowed is None or (allowed is not _ANY and bytes(raw).decode() not in allowed):
            return None
    prompt = bytes(fields.get("prompt", b""))
    if path == COMPLETIONS and not (prompt.startswith(b'"') or prompt[1:].lstrip()[:1].isdigit()):
        return None  # several prompts in one
    return Tape(request, fields, chat=path == CHAT)


def _without(event: bytes, ids: "re.Match[bytes]") -> bytes:
    """As the instance would have sent it unasked."""
    return event[: ids.start(1)] + b"null" + event[ids.end(1) :]


def _number(raw: msgspec.Raw | None) -> int | None:
    """A whole number as it stands in a body (which was checked); ``None``: it is not there, or null."""
    text = b"" if raw is None else bytes(raw)
    return int(text) if text.isdigit() else None
