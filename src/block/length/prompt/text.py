"""What a client asked, as one text: chat messages, prompts, token ids and parts that are no text.

A conversation becomes one string, each message headed by its role between two control characters that no prompt
contains by accident; a bare prompt stays as it is. Work is bounded: of a long text the head and the tail are kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

ROLE_OPEN, ROLE_CLOSE = "\x1e", "\x1f"
MESSAGE_CHARS_MAX = 16_384
"""What is kept of one message: three quarters of it from the head, the rest from the tail."""

MESSAGES_MAX = 64
"""What is kept of a conversation: the first message and the last of the others."""

_NOT_TEXT = {"image": "image", "image_url": "image", "input_image": "image", "input_audio": "audio", "audio": "audio"}


def request_text(body: Mapping[str, Any]) -> str:
    """The text of an OpenAI completion or chat request, for `core.Request.prompt`. Never raises; "" if there is none."""
    messages = body.get("messages")
    if isinstance(messages, list):
        return chat_text(messages)
    return prompt_text(body.get("prompt"))


def chat_text(messages: Sequence[Any]) -> str:
    """Messages ({"role", "content"}) as one string. What is no message is left out."""
    kept = list(messages) if len(messages) <= MESSAGES_MAX else [messages[0], *messages[-(MESSAGES_MAX - 1) :]]
    spoken = [message for message in kept if isinstance(message, Mapping)]
    if len(spoken) == 1 and spoken[0].get("role") == "user":
        return content_text(spoken[0].get("content"))
    return "".join(
        f"{ROLE_OPEN}{str(message.get('role', 'user'))[:16]}{ROLE_CLOSE}{content_text(message.get('content'))}"
        for message in spoken
    )


def prompt_text(prompt: Any) -> str:
    """A completion's prompt as text: a string, or the first of a list of them; token ids say nothing ("")."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        prompt = prompt[0]
    return clipped(prompt) if isinstance(prompt, str) else ""


def content_text(content: Any) -> str:
    """A message's content as text: a string or a list of parts; an image or a sound is named in angle brackets."""
    if isinstance(content, str):
        return clipped(content)
    if not isinstance(content, list):
        return ""
    return clipped("\n".join(_part_text(part) for part in content[:MESSAGES_MAX]))


def split_chat(text: str) -> list[tuple[str, str]]:
    """(role, content) of each message of such a string; a bare prompt is one message of the user."""
    if not text.startswith(ROLE_OPEN):
        return [("user", text)]
    spoken = (piece.partition(ROLE_CLOSE) for piece in text[1:].split(ROLE_OPEN))
    return [(role, content) for role, _, content in spoken]


def clipped(text: str, chars: int = MESSAGE_CHARS_MAX) -> str:
    """The text, or its head and tail when it is longer than ``chars``."""
    if len(text) <= chars:
        return text
    tail = chars // 4
    return f"{text[: chars - tail]}\n{text[-tail:]}"


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        return ""
    words = part.get("text")
    if isinstance(words, str):
        return words
    return f"<{_NOT_TEXT.get(str(part.get('type')), 'part')}>"
