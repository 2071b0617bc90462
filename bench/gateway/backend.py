"""A trivial OpenAI backend: canned answers from one asyncio protocol, so that what is measured is what stands before it.

python bench/gateway/backend.py --port 9001 [--ttft-ms 20 --itl-ms 10 --events 100]
"""

import argparse
import asyncio
import json

import uvloop

MODEL = "bench"
USAGE = {"prompt_tokens": 50, "completion_tokens": 16, "total_tokens": 66}


def encoded(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


def event(value: object) -> bytes:
    body = b"data: " + (value if isinstance(value, bytes) else encoded(value)) + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(body), body)


def chat_event(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return event(
        {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]}
    )


MESSAGE = {
    "index": 0,
    "message": {"role": "assistant", "content": "eight words of answer from a trivial backend"},
    "finish_reason": "stop",
}
CHAT = answer(
    encoded(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": MODEL,
            "choices": [MESSAGE],
            "usage": USAGE,
        }
    )
)
MODELS = answer(
    encoded({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "bench"}]})
)
HEALTHY = answer(b"{}")
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM_END = chat_event({}, "stop") + event(b"[DONE]") + b"0\r\n\r\n"


class Backend(asyncio.Protocol):
    """One connection; requests with a content-length, one after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.buffer = options, b""
        self.events = [chat_event({"content": " tok"}) for _ in range(options.events)]
        self.at_once = STREAM_HEAD + b"".join(self.events) + STREAM_END

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + length], self.buffer[end + 4 + length :]
            self.serve(head, body)

    def serve(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"get"):
            self.transport.write(MODELS if b"/v1/models" in head[:40] else HEALTHY)
        elif b'"stream":true' not in body and b'"stream": true' not in body:
            self.transport.write(CHAT)
        elif not self.options.ttft_ms and not self.options.itl_ms:
            self.transport.write(self.at_once)
        else:
            asyncio.get_running_loop().call_later(self.options.ttft_ms / 1e3, self.emit, 0)

    def emit(self, n: int) -> None:
        if self.transport.is_closing():
            return
        if n == len(self.events):
            self.transport.write(STREAM_END)
            return
        self.transport.write(STREAM_HEAD + self.events[0] if n == 0 else self.events[n])
        asyncio.get_running_loop().call_later(self.options.itl_ms / 1e3, self.emit, n + 1)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, action="append", required=True, help="repeat to serve on several ports")
    parser.add_argument("--ttft-ms", type=float, default=0.0)
    parser.add_argument("--itl-ms", type=float, default=0.0)
    parser.add_argument("--events", type=int, default=31)
    options = parser.parse_args()
    loop = asyncio.get_running_loop()
    for port in options.port:
        await loop.create_server(lambda: Backend(options), "127.0.0.1", port, backlog=4096)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
