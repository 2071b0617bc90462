"""Every error Block raises on purpose, split by what the one who meets it can do.

BlockError
├── UserError              say it to the person at the command line, exit code 2
│   ├── ConfigError        a flag, file or field is wrong
│   ├── UnknownNameError   a policy, profile or estimator that does not exist (lists those that do)
│   └── BadInputError      a trace, run directory or model file that cannot be read
├── ClientError            say it to the HTTP client (carries the status)
├── InstanceError          the instance failed: try elsewhere
│   ├── InstanceUnreachableError   not a byte was answered: safe to retry
│   └── StreamBrokenError          died after the answer had begun: tell the client
└── ActuatorError          instances could not be started or stopped: try again later
"""

from collections.abc import Iterable


class BlockError(Exception):
    """Root of all errors that Block raises on purpose."""


class UserError(BlockError):
    """Something the person at the command line can correct. The message says what to do."""


class ConfigError(UserError):
    """A flag, a file or a field of the configuration is wrong."""


class UnknownNameError(UserError):
    """A name that its table does not list."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"There is no {kind} named {name!r}. Known: {', '.join(sorted(known))}.")
        self._given = (kind, name, sorted(known))

    def __reduce__(self) -> tuple[type["UnknownNameError"], tuple[str, str, list[str]]]:
        return type(self), self._given  # an exception's own way would give the message for all three


class BadInputError(UserError):
    """A file given as input cannot be read as what it should be."""


class ClientError(BlockError):
    """A request that the client must correct or repeat later; becomes an OpenAI error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param


class InstanceError(BlockError):
    """An instance did not do its part."""


class InstanceUnreachableError(InstanceError):
    """The instance answered not a single byte; the request can be sent elsewhere."""


class StreamBrokenError(InstanceError):
    """The instance died after its answer had begun."""


class ActuatorError(BlockError):
    """Instances could not be counted, started or stopped; the same order can be given again later."""
