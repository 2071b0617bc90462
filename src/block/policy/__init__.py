"""Policy = shortlist x rank: whom to consider, and what each candidate costs. Pure: no clock, no sockets."""

from block.policy.choose import FALLBACKS, decide
from block.policy.rank import Evidence, Rank
from block.policy.recent import RecentDispatches
from block.policy.shortlist import Shortlist
from block.policy.table import POLICIES, Policy, make_policy, policy_from, policy_names

__all__ = [
    "FALLBACKS",
    "POLICIES",
    "Evidence",
    "Policy",
    "Rank",
    "RecentDispatches",
    "Shortlist",
    "decide",
    "make_policy",
    "policy_from",
    "policy_names",
]
