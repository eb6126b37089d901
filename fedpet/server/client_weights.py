"""Weigh the clients of a round in its average: by examples or alike, none above a share.

A client's number of examples is its own word. `strategy.weights = "uniform"` does not ask for it,
and `strategy.max-share` bounds what any word is worth: weights are cut at the one height L at which
the largest is that share of all of them together,

    L = max-share * (w_1' + ... + w_n'),   w_i' = min(w_i, L),

so that what is cut goes to the others in the proportion of their weights. With fewer than
1 / max-share clients no height does it, and all weigh alike. An entry that only some tiers train is
averaged over their clients, by the weights of the whole round.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["client_weights"]


def client_weights(
    examples: Mapping[str, int], *, rule: str = "examples", max_share: float = 1.0
) -> dict[str, float]:
    """Return the weight of each client whose update is used.

    Args:
        examples: Client -> rows or label tokens that it trained on, at least 1.
        rule: "uniform" weighs all alike; else each weighs what it states.
        max_share: Largest fraction of the sum of the weights that one may be, in (0, 1].

    Returns:
        Client -> weight, above 0: whole numbers, as they were, but for those that are cut.

    Example:
        >>> client_weights({"a": 100, "b": 10, "c": 10}, max_share=0.5)
        {'a': 20.0, 'b': 10, 'c': 10}
    """
    weights: dict[str, float] = {
        name: 1 if rule == "uniform" else count for name, count in examples.items()
    }
    rest = sum(weights.values())  # of the clients below the height
    for cut, largest in enumerate(sorted(weights.values(), reverse=True)):
        if (left := 1 - cut * max_share) <= 0:
            break
        height = max_share * rest / left
        if largest <= height:
            return {
                name: weight if weight <= height else height for name, weight in weights.items()
            }
        rest -= largest
    return dict.fromkeys(weights, 1)  # too few for the share
