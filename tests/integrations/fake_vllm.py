"""Stand-ins with the attributes of vLLM's scheduler and requests that Block's plugin reads."""

from types import SimpleNamespace
from typing import Any


class FakeRequest:
    def __init__(self, key: str, prompt: int = 100, max_tokens: int = 50, **options: Any) -> None:
        fields = {"ignore_eos": False, "stop": [], "stop_token_ids": [], "min_tokens": 0, **options}
        self.request_id, self.sampling_params = key, SimpleNamespace(**fields)
        self.arrival_time, self.priority = 1000.0, 0
        self.num_prompt_tokens, self.max_tokens = prompt, max_tokens
        self.num_computed_tokens = self.num_output_placeholders = self.num_preemptions = (
            self.num_stale_output_tokens
        ) = 0
        self._output_token_ids: list[int] = []


class FakeOutput:
    def __init__(self, tokens: dict[str, int]) -> None:
        self.num_scheduled_tokens = tokens
        self.total_num_scheduled_tokens = sum(tokens.values())


class FakeScheduler:
    """Decodes everything it holds, one token a step; ``asynchronous`` only changes what it says of itself."""

    def __init__(self, *, asynchronous: bool = False, rank: int = 0, running: int = 0, waiting: int = 0) -> None:
        options = SimpleNamespace(async_scheduling=asynchronous, policy="fcfs", max_num_batched_tokens=512)
        self.vllm_config = SimpleNamespace(
            scheduler_config=options, cache_config=SimpleNamespace(enable_prefix_caching=False),
            parallel_config=SimpleNamespace(data_parallel_index=rank),
        )  # fmt: skip
        self.kv_cache_config = SimpleNamespace()
        pool = SimpleNamespace(num_gpu_blocks=1000, get_num_free_blocks=lambda: 700)
        self.kv_cache_manager = SimpleNamespace(block_pool=pool)
        self.max_num_running_reqs, self.max_model_len, self.block_size = 64, 2048, 16
        self.running = [FakeRequest(f"cmpl-run-{i}-0-0123abcd") for i in range(running)]
        self.waiting = [FakeRequest(f"chatcmpl-wait-{i}-0123abcd", prompt=10 * (i + 1)) for i in range(waiting)]
        for request in self.running:
            request.num_computed_tokens = request.num_prompt_tokens

    def schedule(self) -> FakeOutput:
        for request in self.running:
            request.num_computed_tokens += 1
        return FakeOutput({r.request_id: 1 for r in self.running})

    def update_from_output(self, output: FakeOutput, results: object) -> str:
        for request in self.running:
            request._output_token_ids.append(7)
        return "outputs"

    def add_request(self, request: FakeRequest) -> None:
        self.running.append(request)
