"""Real vLLM at a GPU's pace on a machine without one: a worker whose forward pass is the step-time model's latency.

The API server, the scheduler, the KV cache manager and the output path are vLLM's own; only the model's execution is
replaced. A step "runs" for as long as the profile says and returns made-up tokens, never EOS, so answers end at
``max_tokens``. Set ``BLOCK_VLLM_EMULATE=PROFILE`` (a shipped profile's name or a file) and start ``vllm serve MODEL``
as for a GPU; only the model's config and tokenizer are read, no weights. Asynchronous scheduling, which vLLM turns off
on CPUs, stays as asked for. Needs vLLM 0.20 or newer. The idea is LLM-Emu's, which does it for
one version of vLLM.
"""

import os
import time
from collections import deque
from typing import Any, Final

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.worker_base import WorkerBase

from block.engine.limits import EngineLimits
from block.errors import ConfigError
from block.integrations.vllm.scheduler_view import shape_of
from block.steptime.curve import StepCurve
from block.steptime.profile import load_profile

VARIABLE: Final = "BLOCK_VLLM_EMULATE"
KV_CACHE_BYTES: Final = (
    40 << 30
)  # a GPU's memory after the weights, unless VLLM_CPU_KVCACHE_SPACE or --num-gpu-blocks-override say otherwise
FIRST_TOKEN: Final = 100  # beyond the special tokens of the usual vocabularies


class EmulatedGpuWorker(WorkerBase):  # type: ignore[misc]
    """One accelerator that computes nothing, in the time that the profile gives it.

    Raises:
        ConfigError: ``BLOCK_VLLM_EMULATE`` does not name a profile.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        name = os.environ.get(VARIABLE)
        if not name:
            raise ConfigError(f"Set {VARIABLE} to the step-time profile to emulate, e.g. h200-llama3.1-8b.")
        limits = EngineLimits(
            max_num_seqs=self.scheduler_config.max_num_seqs,
            max_num_batched_tokens=max(
                self.scheduler_config.max_num_batched_tokens, self.scheduler_config.max_num_seqs
            ),
            enable_prefix_caching=bool(self.cache_config.enable_prefix_caching),
        )
        self._clock = AcceleratorClock(load_profile(name).curve(limits=limits))
        self._batches = Batches()
        self._scheduled: Any = None
        self._vocabulary = self.model_config.get_vocab_size()

    def init_device(self) -> None:
        import torch

        self.device = torch.device("cpu")

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """There is nothing to load."""

    def get_kv_cache_spec(self) -> dict[str, Any]:
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        model, parallel = self.model_config, self.parallel_config
        spec = FullAttentionSpec(
            block_size=self.cache_config.block_size, num_kv_heads=model.get_num_kv_heads(parallel),
            head_size=model.get_head_size(), dtype=model.dtype,
        )  # fmt: skip
        return {f"model.layers.{i}.self_attn.attn": spec for i in range(model.get_num_layers(parallel))}

    def get_supported_kv_cache_layouts(self) -> list[str]:
        from vllm.v1.attention.backends.utils import KVCacheLayout

        return [next(iter(KVCacheLayout)).name]

    def determine_available_memory(self) -> int:
        return self.cache_config.kv_cache_memory_bytes or KV_CACHE_BYTES

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """There is no cache to lay out."""

    def compile_or_warm_up_model(self) -> Any:
        try:
            from vllm.v1.worker.worker_base import CompilationTimes
        except ImportError:  # before 0.26
            return 0.0
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len

    def execute_model(self, scheduler_output: Any) -> Any:
        """Launch one batch; its tokens come from ``sample_tokens``."""
        from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

        if not scheduler_output.total_num_scheduled_tokens:
            self._batches.forget(scheduler_output.finished_req_ids)
            return EMPTY_MODEL_RUNNER_OUTPUT
        shape, sampled = self._batches.take(scheduler_output)
        self._scheduled = self._clock.launch(*shape), sampled
        return None

    def sample_tokens(self, grammar_output: Any) -> Any:
        """The tokens of the batch just launched, once it is done: at once under asynchronous scheduling, else after
        waiting."""
        ends_s, sampled = self._scheduled
        tokens = [
            [FIRST_TOKEN + position % max(self._vocabulary - FIRST_TOKEN, 1)] if position >= 0 else []
            for position in sampled.values()
        ]
        index = {key: i for i, key in enumerate(sampled)}
        output = ModelRunnerOutput(req_ids=list(sampled), req_id_to_index=index, sampled_token_ids=tokens)
        pending = _Pending(output, self._clock, ends_s)
        return pending if self.scheduler_config.async_scheduling else pending.get_output()

    def execute_dummy_batch(self) -> None:
        """An idle data-parallel rank takes part in nothing here."""


class _Pending(AsyncModelRunnerOutput):  # type: ignore[misc]
    """Results that are there when the accelerator is done."""

    def __init__(self, output: ModelRunnerOutput, clock: "AcceleratorClock", ends_s: float) -> None:
        self._output, self._clock, self._ends_s = output, clock, ends_s

    def get_output(self) -> ModelRunnerOutput:
        self._clock.wait(self._ends_s)
        return self._output


class AcceleratorClock:
    """One accelerator and the thread that feeds it, in real time, by the rules of ``block.engine.pipeline``.

    The accelerator's time line is computed, not slept, so that a late wake-up makes one step late and not all that
    follow.
    """

    def __init__(self, curve: StepCurve) -> None:
        self._curve = curve
        self._free_s = 0.0
        self._heat, self._heated_s = 0.0, 0.0
        self._turn_s = 0.0  # when the thread took in results or ended a launch last
        self._ends: deque[float] = deque(maxlen=64)

    def launch(
        self, decode_requests: int, context: int, prefill_tokens: int, prefill_work: float, chunks: int
    ) -> float:
        """Start a batch; returns when it ends. Busy for as long as a real launch, less what scheduling it took here."""
        now_s = time.monotonic()
        busy = bool(self._ends) and self._ends[-1] > now_s
        curve = self._curve
        launched_s = (self._turn_s if busy else now_s) + curve.launch_s(decode_requests, prefill_tokens, chunks)
        started_s = max(self._free_s, now_s + curve.head_s)
        heat = 0.0
        if chunks:
            heat = curve.heat_after(self._heat, started_s - self._heated_s)
            self._heat, self._heated_s = heat + prefill_tokens, started_s
        step_s = curve.gpu_s(decode_requests, context, prefill_tokens, prefill_work, chunks, heat)
        self._free_s = max(started_s + step_s, launched_s)
        self._ends.append(self._free_s)
        self.wait(launched_s)
        return self._free_s

    def wait(self, until_s: float) -> None:
        left_s = until_s - time.monotonic()
        if left_s > 0:
            time.sleep(left_s)
        self._turn_s = max(until_s, self._turn_s) if left_s > 0 else time.monotonic()


class Batches:
    """What a worker must remember of the requests to know what a batch computes."""

    def __init__(self) -> None:
        self._prompt: dict[str, int] = {}
        self._sampled: dict[str, int] = {}

    def take(self, output: Any) -> tuple[tuple[int, int, int, float, int], dict[str, int]]:
        """The shape of a batch, and for each of its requests the position of the token it yields (-1: none)."""
        self.forget(output.finished_req_ids)
        computed: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            self._prompt.setdefault(new.req_id, len(new.prompt_token_ids or ()))
            self._sampled.setdefault(new.req_id, 0)
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        rows, yields = [], {}
        for key, tokens in output.num_scheduled_tokens.items():
            prompt, before = self._prompt[key], computed[key]
            rows.append((tokens, before, prompt))
            if before + tokens >= prompt + self._sampled[key]:
                yields[key] = prompt + self._sampled[key]
                self._sampled[key] += 1
            else:
                yields[key] = -1
        return shape_of(rows), yields

    def forget(self, keys: Any) -> None:
        for key in keys:
            self._prompt.pop(key, None)
            self._sampled.pop(key, None)


def emulate_gpu() -> None:
    """Make this vLLM use the worker above, in its own process, and schedule as it would for a GPU."""
    from vllm.platforms import current_platform

    platform: Any = current_platform if isinstance(current_platform, type) else type(current_platform)
    if getattr(platform, "_block_emulates", False):
        return
    check = platform.check_and_update_config

    def check_for_gpu(vllm_config: Any) -> None:
        asked = vllm_config.scheduler_config.async_scheduling
        vllm_config.parallel_config.worker_cls = f"{__name__}.{EmulatedGpuWorker.__name__}"
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = asked
        vllm_config.parallel_config.distributed_executor_backend = "uni"

    platform.check_and_update_config = staticmethod(check_for_gpu)
    platform._block_emulates = True
