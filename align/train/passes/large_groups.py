"""Groups with more tokens than a micro-batch may have: they run in parts where the model and the launch allow it."""

from __future__ import annotations

from align.models.probe import Forward, parts_unsupported_reason
from align.train.indexed_groups import GroupView
from align.train.sharding.replicated import Replicated


def limit_rows(sharding: Replicated, groups: GroupView, forward: Forward) -> str | None:
    """Let the policy run groups above the token budget in parts; return a note about them, None without any.

    If that is not supported, each runs in one pass and needs more memory, and the note says why.
    """
    sizes = groups.column(forward.name)
    token_budget = sharding.settings.token_budget
    is_above = (sizes > token_budget) & (sizes > groups.column("longest"))  # one sequence cannot be cut
    if not is_above.any():
        return None
    if forward.name == "plain":
        reason = "a padded forward has no shared prefixes"
    elif sharding.gathers_per_layer:
        reason = "processes that gather weights layer by layer need equally many passes"
    else:
        reason = parts_unsupported_reason(sharding.policy, groups.probe_sequences())
    if reason is None:
        sharding.policy.max_rows = token_budget
    above = f"more tokens than a micro-batch may have ({token_budget}), up to {sizes[is_above].max()}"
    how = "run in parts, with each shared prefix computed once" if reason is None else f"run at once: {reason}"
    return f"{is_above.sum()} of {len(sizes)} groups have {above}; they {how}"
