"""What the gateway knows of each instance: its newest snapshot, its engine model, what was dispatched and not yet seen.

Theory of operation. A predictor streams snapshots; only the newest is kept, as bytes, and it is decoded when a decision
needs it and not before. Loading one into the instance's `Mirror` takes an expected total output for every request in
it (`expectations`).

Between a dispatch and the first snapshot that shows it an instance would look emptier than it is, and simultaneous
arrivals would herd. So each dispatch is also written into a ledger of *unseen* requests, which count in every what-if and
every counter until the key shows up, the answer ends, or ``unseen_after_s`` passes (a predictor that lies or an engine
that lost it). A snapshot that tells only how many requests there are (anonymous, or of a queue longer than it lists)
shows as many of ours as it counts, the earliest dispatched first; the others stay unseen.

Evidence is *stale* when its predictor fell silent, or when the engine has requests running and its state stands still.
Stale is not false: it is simply not used.

Times are wall-clock seconds, as in snapshots; ages of frames are measured on this host alone.
"""

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from block.core import InstanceId, Load, Request
from block.engine.limits import EngineLimits
from block.errors import BadInputError, ConfigError
from block.gateway.deciding.expectations import Expectations, KeptTotals
from block.predict.snapshot import BLOCKS, COMPUTED, PROMPT, EngineSnapshot, decode, request_key
from block.predict.whatif import Mirror, prefill_tokens_per_s
from block.steptime.profile import StepTimeProfile

REQUESTS_MAX: Final = 16384
SKEW_MAX_S: Final = 5.0
TOKENS_MAX: Final = 1 << 24


class Unseen(NamedTuple):
    """One request dispatched to an instance and not yet in a snapshot of it."""

    key: int
    prompt_tokens: int
    max_tokens: int
    expected_total: int
    dispatched_s: float
    priority: int = 0
    hit_tokens: int = 0


class Counters(NamedTuple):
    """A snapshot's counters as plain numbers."""

    waiting: int
    waiting_tokens: int
    unprocessed_tokens: float
    kv_blocks_free: int
    kv_blocks_total: int
    block_size: int


class Evidence:
    """Of one instance. Fed by its ``Subscription`` (frames, step times), by dispatch (sent, ended); asked by decisions."""

    def __init__(
        self, instance: InstanceId, expectations: Expectations, *, stale_after_s: float, unseen_after_s: float
    ) -> None:
        self.instance = instance
        self.stale_after_s, self.unseen_after_s = stale_after_s, unseen_after_s
        self.snapshot: EngineSnapshot | None = None
        self.model = ""
        self.problem: str | None = "no predictor"
        """Why there is no evidence; ``None`` when there is."""
        self.frames = 0
        self.unshown = 0
        """Requests that were in flight for ``unseen_after_s`` and in no snapshot, of an engine that showed too few."""
        self._totals = KeptTotals(expectations)
        self._frame: bytes | None = None
        self._received_s = self._taken_s = 0.0
        self._running = 0
        self._profile: StepTimeProfile | None = None
        self._scale = 1.0
        self._limits: EngineLimits | None = None
        self._mirror: Mirror | None = None
        self._loaded = False
        self._counters: Counters | None = None
        self._unseen: dict[int, Unseen] = {}
        self._pace_of: Mirror | None = None
        self._tokens_per_s = 0.0
        self._sent: dict[int, Unseen] = {}  # all that are there and not over, in order of dispatch

    # Fed

    def take_frame(self, frame: bytes, now_s: float) -> None:
        """The newest snapshot's bytes."""
        self._frame, self._received_s = frame, now_s
        self.frames += 1

    def take_profile(self, profile: StepTimeProfile, scale: float) -> None:
        """The instance's step times and what its predictor's calibration multiplies them by."""
        self._profile, self._scale, self._mirror, self._loaded = profile, scale, None, False

    def lost(self, problem: str) -> None:
        """The predictor is gone; what it said last ages."""
        self.problem = problem

    def sent(self, request: Request, max_tokens: int, expected_total: int, now_s: float, hit_tokens: int = 0) -> int:
        """A request was dispatched to this instance; returns its key. ``hit_tokens``: found in its prefix cache."""
        key = request_key(request.id)
        total = max(1, min(expected_total, max_tokens))
        unseen = Unseen(key, request.prompt_tokens, max_tokens, total, now_s, request.priority, hit_tokens)
        self._unseen[key] = self._sent[key] = unseen
        if self._loaded and self._mirror is not None:
            self._mirror.add(*unseen)
        return key

    def ended(self, key: int) -> None:
        """Its answer is over (the mirror forgets it with the next snapshot)."""
        self._unseen.pop(key, None)
        self._sent.pop(key, None)

    def spoiled(self, problem: str) -> None:
        """The engine model could not work with this snapshot: unusable until another comes."""
        self.snapshot, self._loaded, self.problem = None, False, problem

    # Asked

    @property
    def unseen(self) -> int:
        return len(self._unseen)

    def age_s(self, now_s: float) -> float:
        """Since its predictor last said something."""
        return now_s - self._received_s

    def silence_s(self, now_s: float) -> float | None:
        """For how long an engine with requests running has stood still, by its own snapshots; ``None``: nothing runs."""
        if not self._read(now_s) or not self._running or now_s - self._received_s > self.stale_after_s:
            return None
        return now_s - self._taken_s

    def fresh(self, now_s: float) -> bool:
        """Whether a snapshot is at hand that can be used; ``problem`` says why not."""
        if not self._read(now_s):
            return False
        silent_s, age_s = now_s - self._received_s, now_s - self._taken_s
        if (
            silent_s <= self.stale_after_s
            and age_s >= -SKEW_MAX_S
            and (age_s <= self.stale_after_s or not self._running)
        ):
            self.problem = None
            return True
        if silent_s > self.stale_after_s:
            self.problem = f"its predictor has been silent for {silent_s:.1f} s"
        elif age_s < 0:
            self.problem = f"its predictor's clock is {-age_s:.1f} s ahead"
        else:
            self.problem = f"its engine has stood still for {age_s:.1f} s"
        return False

    def mirror(self, now_s: float) -> Mirror | None:
        """The engine model up to date with the newest snapshot and the unseen requests; ``None``: no usable evidence.

        Raises:
            ValueError and its like: the model cannot work with the snapshot (then call ``spoiled``).
        """
        if not self.fresh(now_s):
            return None
        profile, snapshot = self._profile, self.snapshot
        assert snapshot is not None
        if profile is None:
            self.problem = "its predictor told no step times"
            return None
        if self._mirror is None or self._limits != snapshot.limits:
            curve = profile.curve(self._scale, snapshot.limits)
            self._mirror, self._limits = Mirror(curve, profile.input_s, profile.output_s), snapshot.limits
        if not self._loaded:
            self._mirror.load(snapshot, self._totals.of(snapshot, self.model, now_s), self._hits(snapshot))
            self._mirror.output_s = profile.output_s + profile.output_request_s * (snapshot.running + 1)
            self._loaded = True
            for unseen in self._unseen.values():
                self._mirror.add(*unseen)
        return self._mirror

    def load(self, in_flight: int, sent_last_minute: int, in_flight_tokens: int, now_s: float) -> Load:
        """Counters: the engine's own with the unseen added where its snapshots are fresh, else the gateway's books."""
        if not self.fresh(now_s):
            return Load(in_flight, 0, in_flight, 0, float(in_flight_tokens), sent_last_minute)
        counters = self._counters or self._count(now_s)
        unseen, prompts, tokens = len(self._unseen), 0, 0
        for request in self._unseen.values():
            prompts += request.prompt_tokens
            tokens += request.prompt_tokens + request.expected_total
        waiting = counters.waiting + unseen
        return Load(
            self._running, waiting, self._running + waiting, counters.waiting_tokens + prompts,
            counters.unprocessed_tokens + tokens, sent_last_minute, counters.kv_blocks_free, counters.kv_blocks_total,
            counters.block_size, max(0.0, now_s - self._taken_s), self._pace(),
        )  # fmt: skip

    # Inside

    def _hits(self, snapshot: EngineSnapshot) -> npt.NDArray[np.int32] | None:
        """Prompt tokens that waiting requests will find in the prefix cache, of those that this gateway sent; ``None``: none."""
        if not snapshot.waiting or not snapshot.limits.enable_prefix_caching:
            return None
        sent, running = self._sent, snapshot.running
        hits = np.zeros(running + snapshot.waiting, np.int32)
        for i, key in enumerate(snapshot.keys[running:].tolist(), running):
            if key in sent:
                hits[i] = sent[key].hit_tokens
        return hits

    def _pace(self) -> float | None:
        """Prompt tokens per second of full steps, by its step times."""
        mirror, limits = self._mirror, self._limits
        if mirror is None or limits is None:
            return None
        if self._pace_of is not mirror:
            self._pace_of, self._tokens_per_s = mirror, prefill_tokens_per_s(mirror.curve, limits)
        return self._tokens_per_s

    def _read(self, now_s: float) -> bool:
        """Decode the newest frame if that is still to do; whether there is a snapshot."""
        frame = self._frame
        if frame is None:
            return self.snapshot is not None
        self._frame, before = None, self.snapshot
        try:
            snapshot = decode(frame)
            check(snapshot)
        except (BadInputError, ConfigError, ValueError, OverflowError) as error:
            self.spoiled(f"its predictor sent a snapshot that makes no sense: {error}")
            return False
        if before is not None and before.epoch == snapshot.epoch and snapshot.sequence < before.sequence:
            return True  # older than what is known
        self.snapshot, self._loaded, self._counters = snapshot, False, None
        self._taken_s, self._running = snapshot.taken_s, snapshot.running
        if snapshot.anonymous:
            self._settle_by_number(snapshot)
        elif self._unseen:
            self._settle(snapshot, now_s)
        return True

    def _settle(self, snapshot: EngineSnapshot, now_s: float) -> None:
        """Strike from the ledger what the snapshot shows, and what waited too long to be shown."""
        for key in self._unseen.keys() & set(snapshot.keys.tolist()):
            del self._unseen[key]
        unlisted = snapshot.waiting_total - snapshot.waiting
        if unlisted > 0:
            for key in [u.key for u in self._unseen.values() if u.dispatched_s < snapshot.taken_s][:unlisted]:
                del self._unseen[key]
        overdue_s = now_s - self.unseen_after_s
        overdue = [unseen.key for unseen in self._unseen.values() if unseen.dispatched_s < overdue_s]
        if overdue and len(self._unseen) > self._running + int(snapshot.header["waiting_total"]):
            self.unshown += len(overdue)
        for key in overdue:
            del self._unseen[key]

    def _settle_by_number(self, snapshot: EngineSnapshot) -> None:
        """Of a snapshot without names: what it does not count is unseen, and so is what was dispatched after it was taken."""
        before = [unseen for unseen in self._sent.values() if unseen.dispatched_s < snapshot.taken_s]
        later = list(self._sent.values())[len(before) :]
        counted = snapshot.running + snapshot.waiting_total
        self._unseen = {unseen.key: unseen for unseen in before[counted:] + later}

    def _count(self, now_s: float) -> Counters:
        snapshot = self.snapshot
        assert snapshot is not None
        header, rows = snapshot.header, snapshot.requests
        to_compute = rows[PROMPT] - rows[COMPUTED]
        totals = self._totals.of(snapshot, self.model, now_s)
        self._counters = Counters(
            waiting=int(header["waiting_total"]),
            waiting_tokens=int(to_compute[self._running :].sum()) + int(header["waiting_tokens_beyond"]),
            unprocessed_tokens=float(np.maximum(to_compute + totals, 0).sum()),
            kv_blocks_free=snapshot.kv_blocks_free,
            kv_blocks_total=snapshot.limits.blocks_usable,
            block_size=snapshot.limits.block_size,
        )
        return self._counters


def check(snapshot: EngineSnapshot) -> None:
    """Refuse what no engine can be in: it could send the compiled model astray.

    Raises:
        ValueError: with what is wrong.
    """
    rows, limits = snapshot.requests, snapshot.limits
    if rows.shape[1] > REQUESTS_MAX or int(snapshot.header["waiting_total"]) > (1 << 20):
        raise ValueError("too many requests")
    if not np.isfinite(snapshot.taken_s) or not 0 <= snapshot.kv_blocks_free <= limits.num_gpu_blocks:
        raise ValueError("time or free blocks")
    if not rows.shape[1]:
        return
    counts = rows[PROMPT : BLOCKS + 1]  # all rows up to the blocks count something
    if int(counts.min()) < 0 or int(counts.max()) > TOKENS_MAX:
        raise ValueError("counts out of range")
    if not limits.enable_prefix_caching and int(rows[BLOCKS].sum()) > limits.num_gpu_blocks:
        raise ValueError("more blocks in use than there are")
    if not np.isfinite(snapshot.arrived).all():
        raise ValueError("arrival times")
