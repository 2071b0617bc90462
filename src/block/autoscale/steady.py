"""Wall time that does not jump: the wall's when this process began, and from then on the machine's monotonic clock.

Whoever sets the machine's clock (NTP after a long sleep, an operator) would otherwise make the autoscaler forget how long a
lower count was asked for, or wait for hours until "now" comes again.
"""

import time

_BEGAN_S = time.time() - time.monotonic()


def now_s() -> float:
    """Seconds since the epoch, as the wall clock would say had nobody touched it."""
    return _BEGAN_S + time.monotonic()
