"""What a workload offers: the request that the system sees, and the truth that it must not see."""

import msgspec

from block.core import PromptBlocks, Request


class Offered(msgspec.Struct, frozen=True):
    """A request and its truth. Policies and predictors get ``request`` only (law L7); drivers get the whole.

    ``request.arrived_s`` is the intended send time in seconds from the workload's start.
    """

    request: Request
    output_tokens: int
    blocks: PromptBlocks | None = None
