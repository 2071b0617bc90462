"""Prefix caches in simulated engines, what gateways know of them, and the policies that use it."""

from random import Random

import pytest

from block.core import Candidate, InstanceId, Load, PromptBlocks, Request
from block.engine.kernel import FastEngine
from block.engine.limits import EngineLimits
from block.engine.pipeline import Engine
from block.engine.prefix import PrefixCache
from block.engine.sequence import Sequence
from block.metrics import summarize
from block.policy import decide, make_policy
from block.policy.prefix import CHUNK_BYTES, PrefixIndex, blocks_of
from block.simulate import SimulationConfig, simulate
from block.simulate.config import GatewayModel, InstanceGroup
from block.steptime.profile import StepTimeProfile
from block.workload import Offered

PROFILE = StepTimeProfile(
    name="linear", gpu="test", model="test", decode_knots=[(0, 0.016), (64, 0.02336)],
    mixed_knots=[(0, 0.016), (512, 0.07488)], kv_s=5.8e-7, attention_s=3.2e-8,
)  # fmt: skip
LIMITS = EngineLimits(
    max_num_seqs=16, max_num_batched_tokens=512, num_gpu_blocks=601, max_model_len=8192, async_scheduling=False,
    enable_prefix_caching=True,
)  # fmt: skip
CHUNK = 64


def chain(session: int, chunks: int) -> tuple[int, ...]:
    return tuple(1000 * session + n for n in range(chunks))


def conversations(count: int, seed: int, rate_rps: float = 3.0, sessions: int = 12) -> list[Offered]:
    """Turns of some sessions, each repeating the one before and adding to it."""
    rng, now_s, turns, offered = Random(seed), 0.0, dict.fromkeys(range(sessions), 1), list[Offered]()
    for n in range(count):
        now_s += rng.expovariate(rate_rps)
        session = rng.randrange(sessions)
        turns[session] = turns[session] % 12 + 1
        blocks = PromptBlocks(CHUNK, chain(session, turns[session]))
        request = Request(
            id=f"r{n:04d}", arrived_s=now_s, prompt_tokens=CHUNK * turns[session] + rng.randint(1, 60), blocks=blocks
        )
        offered.append(Offered(request, rng.randint(5, 80), blocks))
    return offered


def config(policy: str, count: int = 4, **fields: object) -> SimulationConfig:
    group = InstanceGroup(count=count, profile=PROFILE, limits=LIMITS)
    return SimulationConfig(policy=policy, instances=[group], **fields)


def test_a_beginning_is_found_until_memory_is_needed_and_its_end_goes_first() -> None:
    cache = PrefixCache(CHUNK, 16)
    cache.expect(0, chain(1, 4), 4 * CHUNK + 1)
    assert cache.look(0) == (0, 0)
    assert cache.match_tokens(chain(1, 4), 300) == 4 * CHUNK  # it is about to be computed
    cache.admit(0, 0)
    cache.complete(0)
    assert cache.match_tokens(chain(1, 4), 4 * CHUNK) == 3 * CHUNK  # the last token of a prompt is always computed
    assert cache.match_tokens((1000, 1001, 77), 300) == 2 * CHUNK
    cache.release(0, over=True)
    cache.fit(2 * cache.chunk_blocks)
    assert cache.match_tokens(chain(1, 4), 300) == 2 * CHUNK
    assert len(cache) == 2


def test_shared_chunks_are_charged_to_one_and_inherited() -> None:
    cache = PrefixCache(CHUNK, 16)
    for row in (0, 1):
        cache.expect(row, chain(1, 3), 3 * CHUNK + 5)
    cache.admit(0, 0)
    cache.complete(0)
    assert cache.look(1) == (3 * CHUNK, 3 * cache.chunk_blocks)
    cache.admit(1, 3 * CHUNK)
    assert cache.release(0, over=True) == ((1, 3 * cache.chunk_blocks),)
    assert cache.release(1, over=True) == ()
    assert len(cache) == 3


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_block_is_lost_or_made_with_a_cache_under_pressure(seed: int) -> None:
    """L2, with preemptions and sharing: when all is over, all memory is free."""
    limits = EngineLimits(
        max_num_seqs=16, max_num_batched_tokens=512, num_gpu_blocks=121, max_model_len=2048, async_scheduling=False,
        enable_prefix_caching=True, scheduler_reserve_full_isl=False,
    )  # fmt: skip
    engine = FastEngine(limits, PROFILE.curve(1.0, limits))
    engine.cache = PrefixCache(CHUNK, 16)
    for number, one in enumerate(conversations(150, seed, rate_rps=12.0)):
        request = one.request
        row = engine.add(request.prompt_tokens, 1000, one.output_tokens, request.arrived_s, 0, 0, number)
        engine.expect(row, one.blocks.keys)
        engine.advance(request.arrived_s)
        assert 0 <= engine.load()[3] <= limits.blocks_usable
    engine.advance(1e9)
    assert len(engine.collect()) > 0
    assert engine.load() == (0, 0, 0, limits.blocks_usable)
    assert engine.preemptions > 0
    assert len(engine.cache) * engine.cache.chunk_blocks <= limits.blocks_usable


def test_the_fast_engines_cache_does_what_the_stepping_scheduler_does() -> None:
    """Against the decision-by-decision model with block identities: the same times to within a few steps."""
    offered = conversations(200, 4)
    engine, fast = Engine(LIMITS, PROFILE.curve(1.0, LIMITS)), FastEngine(LIMITS, PROFILE.curve(1.0, LIMITS))
    fast.cache = PrefixCache(CHUNK, 16)
    sequences = []
    for number, one in enumerate(offered):
        request, keys = one.request, one.blocks.keys
        own = [f"{keys[n // 4]}.{n % 4}" if n // 4 < len(keys) else f"{request.id}.{n}" for n in range(200)]
        sequence = Sequence(
            request.id, request.prompt_tokens, 2000, one.output_tokens, arrived_s=request.arrived_s, block_keys=own
        )
        engine.add(sequence, request.arrived_s)
        sequences.append(sequence)
        row = fast.add(request.prompt_tokens, 2000, one.output_tokens, request.arrived_s, 0, 0, number)
        fast.expect(row, keys)
    engine.advance(1e9)
    fast.advance(1e9)
    times = {label: (first_s, finished_s) for label, _, first_s, finished_s, _ in fast.collect()}
    errors = sorted(abs(times[n][1] - s.finished_s) / (s.finished_s - s.arrived_s) for n, s in enumerate(sequences))
    assert errors[len(errors) // 2] < 0.01
    assert errors[int(0.95 * len(errors))] < 0.1


def mean_ttft_s(policy: str, **fields: object) -> float:
    rows = simulate(config(policy, **fields), conversations(500, 7, rate_rps=9.0))
    assert {row.status for row in rows} == {"finished"}
    return summarize(rows).ttft_s_mean


def test_knowing_the_caches_makes_first_tokens_come_sooner() -> None:
    blind = mean_ttft_s("llumnix-minus")
    for policy in ("prefix-affinity", "consistent-hash", "block", "block-paper"):
        assert mean_ttft_s(policy) < blind, policy


@pytest.mark.parametrize("policy", ["prefix-affinity", "block-paper"])
def test_gateways_with_stale_snapshots_remember_what_they_sent_where(policy: str) -> None:
    stale = GatewayModel(snapshot_interval_s=0.1)
    assert mean_ttft_s(policy, gateways=stale) < mean_ttft_s("llumnix-minus", gateways=stale)


def test_a_prediction_knows_what_is_cached() -> None:
    """One session on one instance: what is predicted with a warm cache is what happens."""
    keys, offered = chain(1, 40), list[Offered]()
    for n in range(2):
        blocks = PromptBlocks(CHUNK, keys)
        request = Request(id=f"r{n}", arrived_s=30.0 * n, prompt_tokens=40 * CHUNK + 10, blocks=blocks)
        offered.append(Offered(request, 10, blocks))
    cold, warm = simulate(config("block-paper", count=1), offered)
    assert warm.ttft_s < 0.5 * cold.ttft_s
    for row in (cold, warm):
        assert row.predicted_ttft_s == pytest.approx(row.ttft_s, rel=0.05)


def load(in_flight: int) -> Load:
    return Load(in_flight, 0, in_flight, kv_blocks_free=100, kv_blocks_total=200)


def request(keys: tuple[int, ...] = (1, 2, 3), session: str | None = None) -> Request:
    return Request(id="r", arrived_s=0.0, prompt_tokens=200, session=session, blocks=PromptBlocks(64, keys))


def test_prefix_affinity_goes_to_the_longest_match_unless_it_is_short_or_its_instance_busy() -> None:
    policy, rng = make_policy("prefix-affinity", match_fraction=0.5, load_ratio=1.5, load_slack=4), Random(1)
    a, b = InstanceId("a"), InstanceId("b")

    def choice(hit_tokens: int, busy: int) -> str:
        candidates = [Candidate(a, load(busy), None, hit_tokens), Candidate(b, load(2))]
        return decide(policy, request(), candidates, rng).instance

    assert choice(128, 5) == "a"
    assert choice(64, 5) == "b"
    assert choice(128, 7) == "b"


def test_consistent_hashing_keeps_sessions_together_spreads_them_and_bounds_the_load() -> None:
    policy, rng = make_policy("consistent-hash", bound=1.25), Random(1)
    ids = [InstanceId(f"i{n}") for n in range(8)]

    def home(session: str, among: list[InstanceId], busy: dict[str, int] | None = None) -> str:
        candidates = [Candidate(i, load((busy or {}).get(i, 1))) for i in among]
        return decide(policy, request(session=session), candidates, rng).instance

    sessions = [f"s{n}" for n in range(400)]
    homes = {s: home(s, ids) for s in sessions}
    assert homes == {s: home(s, ids) for s in sessions}
    shares = [list(homes.values()).count(i) for i in ids]
    assert min(shares) > 15
    gone = ids[3]
    moved = sum(home(s, [i for i in ids if i != gone]) != homes[s] for s in sessions if homes[s] != gone)
    assert moved == 0, "only the sessions of the instance that left move"
    first = homes["s0"]
    assert home("s0", ids, {first: 50}) != first


def test_equal_beginnings_have_equal_keys_and_an_index_forgets_what_was_longest_unused() -> None:
    text = bytes(range(256)) * 40
    whole, shorter = blocks_of(text, 2560), blocks_of(text[: 5 * CHUNK_BYTES], 1280)
    assert whole is not None
    assert shorter is not None
    assert whole.tokens == 256
    assert shorter.keys == whole.keys[:5]
    assert blocks_of(text, 2560, "another model").keys[0] != whole.keys[0]
    assert blocks_of(b"short", 2) is None
    index = PrefixIndex(8)
    index.note(shorter)
    assert index.match_tokens(whole, 2560) == 5 * 256
    assert index.match_tokens(shorter, 1280) == 4 * 256
    index.note(PromptBlocks(256, (1, 2, 3, 4, 5)))
    assert index.match_tokens(whole, 2560) == 3 * 256, "the end goes before the beginning"
