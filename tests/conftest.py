"""Settings of all tests: hypothesis draws the same examples every time, so that a green run stays green."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
