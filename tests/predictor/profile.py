"""A profile of our own, with steps of a millisecond or two."""

from block.steptime.profile import StepTimeProfile

PROFILE = StepTimeProfile(
    name="test", gpu="none", model="none",
    decode_knots=[(1, 0.001), (64, 0.002)], prefill_knots=[(1, 0.0001), (2048, 0.003)], kv_s=1e-8,
)  # fmt: skip
