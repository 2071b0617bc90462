"""A black-box conformance suite for OpenAI-compatible gateways: named checks against a URL, nothing but sockets."""

from block.conformance.check import Check, Outcome, Result
from block.conformance.run import GROUPS, all_checks, run_checks
from block.conformance.target import Target, open_target

__all__ = ["GROUPS", "Check", "Outcome", "Result", "Target", "all_checks", "open_target", "run_checks"]
