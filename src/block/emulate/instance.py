"""One emulated engine, put together: from a checked job to a sequence in the engine and back."""

import uuid

from block.clock import Clock, MonotonicClock
from block.emulate import tokens
from block.emulate.answers import Answer
from block.emulate.config import EmulateConfig
from block.emulate.faults import Failures
from block.emulate.lateness import Lateness
from block.emulate.lengths import output_lengths
from block.emulate.measures import Measures
from block.emulate.openai import Job, bad_request
from block.emulate.pace import PausableClock
from block.emulate.player import Player
from block.emulate.publish import Publisher
from block.engine.pipeline import Engine
from block.engine.sequence import Sequence
from block.errors import ClientError
from block.predict.snapshot import request_key
from block.steptime.profile import load_profile


class Instance:
    """The engine, its player and its publisher. The ``player`` needs a timer before the first request.

    Raises (all at construction):
        UnknownNameError: no such profile or length distribution.
        ConfigError: a setting is wrong.
        BadInputError: another live engine publishes under the name.
    """

    def __init__(self, config: EmulateConfig, clock: Clock | None = None) -> None:
        self.config = config
        self.profile = load_profile(config.profile)
        self.lengths = output_lengths(config.output_lengths, config.seed)
        self.failures = Failures(config.fail_rate, config.seed + 1)
        self.clock = PausableClock(clock or MonotonicClock())
        self.engine = Engine(config.limits, self.profile.curve(1 / config.speed, config.limits), self.clock.now_s())
        self.measures = Measures(config.limits.max_model_len)
        self.lateness = Lateness(self.measures.late)
        self._exact: dict[int, Sequence] = {}  # in play with an output that the client fixed
        self.publisher = (
            None if config.name is None
            else Publisher(self.engine, self.clock, config.name, self._exact,
                           min_interval_s=config.snapshot_interval_s, cached_blocks=config.publish_cached_blocks)
        )  # fmt: skip
        self.player = Player(
            self.engine, self.clock, self.measures, self.lateness, self._on_change,
            input_s=self.profile.input_s, output_s=self.profile.output_s,
            output_request_s=self.profile.output_request_s,
        )  # fmt: skip

    def slow_down(self, factor: float) -> None:
        """From the next step on all steps take ``factor`` times as long as configured."""
        self.engine.curve = self.profile.curve(factor / self.config.speed, self.config.limits)

    def sequence_of(self, job: Job, request_id: str | None, wanted_output: int | None) -> Sequence:
        """The sequence that plays a job, ready for ``start``.

        ``wanted_output``: the experiment's true output length, ``None``: decide here.

        Raises:
            ClientError: unknown model, or it does not fit into the context, the policy or the KV blocks.
        """
        limits = self.config.limits
        self.check_model(job.model)
        max_tokens = self._max_tokens(job)
        if job.priority and limits.policy != "priority":
            raise bad_request(f"Got priority {job.priority} but priority scheduling is not enabled.", "priority")
        if wanted_output is None:
            wanted_output = max_tokens if job.exact_output else self.lengths.next()
        arrived_s = self.clock.now_s()
        sequence = Sequence(
            request_key(request_id or uuid.uuid4().hex), job.prompt_tokens, max_tokens, max(wanted_output, 1),
            priority=job.priority, order=arrived_s, arrived_s=arrived_s,
        )  # fmt: skip
        if not self.engine.scheduler.can_ever_run(sequence):
            raise bad_request(
                f"This request needs more KV cache than the {limits.blocks_usable} blocks of {limits.block_size} "
                "tokens that this engine has."
            )
        if limits.enable_prefix_caching:
            answer = tokens.answer(job.answer_seed, 0, sequence.stop_after)
            sequence.block_keys = tokens.block_keys(job.prompt + answer, limits.block_size, job.cache_salt)
        return sequence

    def start(self, sequence: Sequence, job: Job, answer: Answer) -> None:
        if sequence.key in self.player:  # the same X-Request-Id twice at once: the later one gets a key of its own
            sequence.key = request_key(uuid.uuid4().hex)
        if job.exact_output:
            self._exact[sequence.key] = sequence
        self.player.add(sequence, answer)

    def leave(self, sequence: Sequence) -> None:
        """The request is over, whoever ended it; one that was never started is ignored."""
        self.player.abort(sequence)
        if self._exact.get(sequence.key) is sequence:
            del self._exact[sequence.key]

    def check_model(self, model: str | None) -> None:
        if model is not None and model not in self.config.models:
            raise ClientError(404, f"The model `{model}` does not exist.", kind="NotFoundError", param="model")

    def _max_tokens(self, job: Job) -> int:
        """The client's bound or what the context leaves."""
        longest, prompt = self.config.limits.max_model_len, job.prompt_tokens
        if prompt >= longest:
            raise bad_request(
                f"This model's maximum context length is {longest} tokens. However, your request has {prompt} input "
                "tokens. Please reduce the length of the input messages.", "messages" if job.chat else "prompt",
            )  # fmt: skip
        if job.max_tokens is None:
            return longest - prompt
        if prompt + job.max_tokens > longest:
            raise bad_request(
                f"'max_tokens' or 'max_completion_tokens' is too large: {job.max_tokens}. This model's maximum "
                f"context length is {longest} tokens and your request has {prompt} input tokens "
                f"({job.max_tokens} > {longest} - {prompt}).",
                "max_tokens",
            )
        return job.max_tokens

    def _on_change(self) -> None:
        if self.publisher is not None:
            self.publisher.engine_changed()
