"""What the gateway knows of each instance: its newest snapshot, its engine model, what was dispatched and not yet seen.

Theory of operation. A predictor streams snapshots; only the newest is kept, as bytes, and it is decoded when a decision
needs it and not before. Loading one into the instance's `Mirror` takes an expected total output for every request in it:
those that this gateway sent have their own estimate (found by ``request_key``), others get what history says, and a length
the client fixed is what it is. All of them are one look-up in the estimator's bank.

Between a dispatch and the first snapshot that shows it an instance would look emptier than it is, and simultaneous
arrivals would herd. So each dispatch is also written into a ledger of *unseen* requests, which count in every what-if and
every counter until the key shows up, the answer ends, or ``unseen_after_s`` passes (a predictor that lies or an engine
that lost it). Evidence is *stale* when its predictor fell silent, or when the engine has requests running and its state
stands still. Stale is not false: it is simply not used.

Times are wall-clock seconds, as in snapshots; ages of frames are measured on this host alone.
"""

from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from block.core import InstanceId, LengthEstimate, Load, Request
from block.errors import BadInputError, ConfigError
from block.predict.snapshot import (
    BLOCKS,
    COMPUTED,
    EXACT,
    FLAGS,
    MAX_TOKENS,
    OUTPUT,
    PROMPT,
    EngineSnapshot,
    decode,
    request_key,
)  # fmt: skip
from block.predict.whatif import Mirror
from block.steptime.curve import StepCurve

REQUESTS_MAX: Final = 16384
SKEW_MAX_S: Final = 5.0
TOTALS_KEPT_S: Final = 0.25
_TOKENS_MAX: Final = 1 << 24
_LIMITS_AT: Final = HEADER.fields["num_gpu_blocks"][1]  # type: ignore[index]
_FLAGS_AT: Final = HEADER.fields["flags"][1]  # type: ignore[index]

Ints = npt.NDArray[np.int32]


class Unseen:
    """One request dispatched to an instance and not yet in a snapshot of it."""

    __slots__ = ("dispatched_s", "expected_total", "key", "max_tokens", "prompt_tokens")

    def __init__(self, key: int, prompt_tokens: int, max_tokens: int, expected_total: int, dispatched_s: float) -> None:
        self.key, self.prompt_tokens, self.max_tokens = key, prompt_tokens, max_tokens
        self.expected_total, self.dispatched_s = expected_total, dispatched_s


class Bank(Protocol):
    """The vectorized side of an estimator (`block.length.distribution.DistributionBank`)."""

    def expected_totals(self, rows: Ints, generated: Ints, caps: Ints) -> Ints: ...


class Expectations:
    """Estimates of the gateway's own requests in flight by key; expected totals for whole snapshots."""

    def __init__(self, estimator: Any) -> None:
        self._estimator = estimator
        self._bank: Bank | None = getattr(estimator, "bank", None)
        self._own: dict[int, tuple[int, int] | LengthEstimate] = {}

    def __len__(self) -> int:
        return len(self._own)

    def expect(self, key: int, estimate: Any) -> None:
        """A request goes out with this estimate."""
        self._own[key] = (estimate.row, estimate.cap) if self._bank is not None else estimate

    def forget(self, key: int) -> None:
        """Its answer is over."""
        self._own.pop(key, None)

    def totals(self, snapshot: EngineSnapshot, model: str) -> Ints:
        """Expected total output tokens of every request in a snapshot, above what it has generated. Shape (n,)."""
        rows = snapshot.requests
        generated, cap = rows[OUTPUT], rows[MAX_TOKENS]
        exact = (rows[FLAGS] & EXACT).astype(bool)
        own, keys = self._own, snapshot.keys.tolist()
        if self._bank is None:
            default = self._foreign(model)
            guess = [self._one(own.get(key, default), int(g)) for key, g in zip(keys, generated, strict=True)]
            totals = np.where(exact, cap, np.array(guess, dtype=np.int32))
        else:
            foreign = self._foreign(model)
            pair = (foreign.row, foreign.cap)
            pairs = np.array([own.get(key, pair) for key in keys], dtype=np.int32).reshape(len(keys), 2)
            caps = np.minimum(pairs[:, 1], cap)
            totals = np.where(exact, cap, self._bank.expected_totals(pairs[:, 0], generated, np.maximum(caps, 1)))
        return np.maximum(np.minimum(totals, np.maximum(cap, 1)), generated + 1).astype(np.int32)

    @staticmethod
    def _one(estimate: Any, generated: int) -> int:
        return round(estimate.expected_total(generated))

    def _foreign(self, model: str) -> Any:
        """What to expect of a request that someone else sent."""
        return self._estimator.estimate(Request(id="", arrived_s=0.0, prompt_tokens=1, model=model))


class Evidence:
    """Of one instance. Fed by its ``Subscription`` (frames, curve), by dispatch (sent, ended); asked by decisions."""

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
        self._expectations = expectations
        self._frame: bytes | None = None
        self._received_s = 0.0
        self._mirror: Mirror | None = None
        self._loaded = False
        self._unseen: dict[int, Unseen] = {}
        self._unprocessed: float | None = None

    # Fed

    def take_frame(self, frame: bytes, now_s: float) -> None:
        """The newest snapshot's bytes."""
        self._frame, self._received_s = frame, now_s
        self.frames += 1

    def take_curve(self, curve: StepCurve, input_s: float, output_s: float) -> None:
        """The instance's step-time curve, calibrated, and the seconds before and after the scheduler."""
        self._mirror, self._loaded = Mirror(curve, input_s, output_s), False

    def lost(self, problem: str) -> None:
        """The predictor is gone; what it said last ages."""
        self.problem = problem

    def sent(self, request: Request, max_tokens: int, expected_total: int, now_s: float) -> int:
        """A request was dispatched to this instance; returns its key."""
        key = request_key(request.id)
        unseen = Unseen(key, request.prompt_tokens, max_tokens, max(1, min(expected_total, max_tokens)), now_s)
        self._unseen[key] = unseen
        if self._loaded:
            self._add(unseen)
        self._unprocessed = None
        return key

    def ended(self, key: int) -> None:
        """Its answer is over (the mirror forgets it with the next snapshot)."""
        self._unseen.pop(key, None)

    # Asked

    @property
    def unseen(self) -> int:
        return len(self._unseen)

    def age_s(self, now_s: float) -> float:
        """Since its predictor last said something."""
        return now_s - self._received_s

    def silence_s(self, now_s: float) -> float | None:
        """For how long an engine with requests running has stood still, by its own snapshots; ``None``: nothing runs."""
        snapshot = self._decoded(now_s)
        if snapshot is None or self.age_s(now_s) > self.stale_after_s or snapshot.running == 0:
            return None
        return now_s - snapshot.taken_s

    def fresh(self, now_s: float) -> bool:
        """Whether a snapshot is at hand that can be used; ``problem`` says why not."""
        snapshot = self._decoded(now_s)
        if snapshot is None:
            return False
        age = now_s - snapshot.taken_s
        if now_s - self._received_s > self.stale_after_s:
            self.problem = f"its predictor has been silent for {now_s - self._received_s:.1f} s"
        elif age < -SKEW_MAX_S:
            self.problem = f"its predictor's clock is {-age:.1f} s ahead"
        elif snapshot.running and age > self.stale_after_s:
            self.problem = f"its engine has stood still for {age:.1f} s"
        else:
            self.problem = None
        return self.problem is None

    def mirror(self, now_s: float) -> Mirror | None:
        """The engine model up to date with the newest snapshot and the unseen requests; ``None``: no usable evidence."""
        if self._mirror is None or not self.fresh(now_s):
            if self._mirror is None and self.problem is None:
                self.problem = "its predictor told no step times"
            return None
        if not self._loaded:
            self._load(now_s)
        return self._mirror

    def load(self, in_flight: int, sent_last_minute: int, in_flight_tokens: int, now_s: float) -> Load:
        """Counters: the engine's own with the unseen added where its snapshots are fresh, else the gateway's bookkeeping."""
        if not self.fresh(now_s):
            return Load(
                running=in_flight, waiting=0, in_flight=in_flight, unprocessed_tokens=float(in_flight_tokens),
                dispatched_last_minute=sent_last_minute,
            )  # fmt: skip
        snapshot = self.snapshot
        assert snapshot is not None
        header, rows, unseen = snapshot.header, snapshot.requests, self._unseen.values()
        running, waiting = snapshot.running, int(header["waiting_total"])
        if self._unprocessed is None:
            self._unprocessed = self._tokens_to_compute(snapshot)
        waiting_rows = rows[PROMPT, running:] - rows[COMPUTED, running:]
        return Load(
            running=running,
            waiting=waiting + len(unseen),
            in_flight=running + waiting + len(unseen),
            waiting_tokens=int(waiting_rows.sum())
            + int(header["waiting_tokens_beyond"])
            + sum(u.prompt_tokens for u in unseen),
            unprocessed_tokens=self._unprocessed,
            dispatched_last_minute=sent_last_minute,
            kv_blocks_free=snapshot.kv_blocks_free,
            kv_blocks_total=snapshot.limits.blocks_usable,
            block_size=snapshot.limits.block_size,
            age_s=max(0.0, now_s - snapshot.taken_s),
        )

    def spoiled(self, problem: str) -> None:
        """The engine model could not work with this snapshot: unusable until another comes."""
        self.snapshot, self._loaded, self.problem = None, False, problem

    # Inside

    def _decoded(self, now_s: float) -> EngineSnapshot | None:
        frame = self._frame
        if frame is None:
            return self.snapshot
        self._frame, self._loaded, self._unprocessed = None, False, None
        before = self.snapshot
        try:
            snapshot = decode(frame)
            _check(snapshot)
        except (BadInputError, ConfigError, ValueError, OverflowError) as error:
            self.snapshot, self.problem = None, f"its predictor sent a snapshot that makes no sense: {error}"
            return None
        if before is not None and before.epoch == snapshot.epoch and snapshot.sequence < before.sequence:
            return before  # older than what is known
        self.snapshot = snapshot
        self._settle(snapshot, now_s)
        return snapshot

    def _settle(self, snapshot: EngineSnapshot, now_s: float) -> None:
        """Strike from the ledger what the snapshot shows, and what waited too long to be shown."""
        if not self._unseen:
            return
        for key in self._unseen.keys() & set(snapshot.keys.tolist()):
            del self._unseen[key]
        overdue = now_s - self.unseen_after_s
        for key in [u.key for u in self._unseen.values() if u.dispatched_s < overdue]:
            del self._unseen[key]

    def _load(self, now_s: float) -> None:
        assert self.snapshot is not None and self._mirror is not None
        self._mirror.load(self.snapshot, self._expectations.totals(self.snapshot, self.model))
        self._loaded = True
        for unseen in self._unseen.values():
            self._add(unseen)

    def _add(self, unseen: Unseen) -> None:
        assert self._mirror is not None
        self._mirror.add(
            unseen.key, unseen.prompt_tokens, unseen.max_tokens, unseen.expected_total, unseen.dispatched_s
        )

    def _tokens_to_compute(self, snapshot: EngineSnapshot) -> float:
        rows = snapshot.requests
        totals = self._expectations.totals(snapshot, self.model)
        present = float((rows[PROMPT] + totals - np.minimum(rows[COMPUTED], rows[PROMPT] + totals)).sum())
        return present + sum(u.prompt_tokens + u.expected_total for u in self._unseen.values())


def _check(snapshot: EngineSnapshot) -> None:
    """Refuse what no engine can be in: it would send the compiled model out of its arrays. Raises ValueError."""
    rows, limits = snapshot.requests, snapshot.limits
    if rows.shape[1] > REQUESTS_MAX:
        raise ValueError(f"{rows.shape[1]} requests")
    if not np.isfinite(snapshot.taken_s) or not 0 <= snapshot.kv_blocks_free <= limits.num_gpu_blocks:
        raise ValueError("time or free blocks")
    if not rows.shape[1]:
        return
    if int(rows[PROMPT:FLAGS].min()) < -_TOKENS_MAX or int(rows[PROMPT:FLAGS].max()) > _TOKENS_MAX:
        raise ValueError("token counts")
    if int(rows[[PROMPT, MAX_TOKENS, COMPUTED, OUTPUT, BLOCKS]].min()) < 0:
        raise ValueError("negative counts")
    if not limits.enable_prefix_caching and int(rows[BLOCKS].sum()) > limits.num_gpu_blocks:
        raise ValueError("more blocks in use than there are")
    if not np.isfinite(snapshot.arrived).all():
        raise ValueError("arrival times")
