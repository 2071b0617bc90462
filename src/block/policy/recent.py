"""How many requests went where in the last minute: the counter behind ``min-qpm``."""

from collections import Counter, deque

from block.core import InstanceId


class RecentDispatches:
    """Counts dispatches per instance over a sliding window. Written by whoever dispatches; bounded by the window.

    One clock only: times given must not go back.
    """

    def __init__(self, window_s: float = 60.0) -> None:
        self.window_s = window_s
        self._sent: deque[tuple[float, InstanceId]] = deque()
        self._count: Counter[InstanceId] = Counter()

    def note(self, instance: InstanceId, now_s: float) -> None:
        """A request was dispatched."""
        self._sent.append((now_s, instance))
        self._count[instance] += 1

    def count(self, instance: InstanceId, now_s: float) -> int:
        """Requests dispatched to the instance in the last ``window_s``."""
        oldest_s = now_s - self.window_s
        while self._sent and self._sent[0][0] <= oldest_s:
            self._count[self._sent.popleft()[1]] -= 1
        return self._count[instance]
