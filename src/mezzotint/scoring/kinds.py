"""What may be said of a figure: decided here and nowhere else.

Knows nothing of models or data.
"""

from __future__ import annotations

EXACT = "exact"
UPPER_BOUND = "upper bound"
LOWER_BOUND = "lower bound"
NOT_A_BOUND = "not a bound"
NO_CODE_LENGTH = "not a code length"

CODE_LENGTHS = ("chain", "causal")
MEANS_OVER_ORDERS = ("nelbo", "orders", "lean")


def kind_of(family: str, bytes_lost: int = 0) -> str:
    """The kind of a figure that is proven, and why. Raises ValueError for a family that nothing is proven about.

    `chain`, `causal`: exact. The positions are revealed in an order that does not depend on the tokens, each charged
    -log of a normalised distribution given those before it, so that the charges' exponentials sum to 1 over all texts of
    this many tokens. Clean context in front of what is charged (`stride`) is text that was charged before: still the chain
    rule. Leaving tokens out of the vocabulary and renormalising keeps every factor a distribution.

    `nelbo`, `lean`: upper bound. The mean of -log p(x | order) over orders drawn by any law that does not depend on x is at
    least -log of the mean of p(x | order), by Jensen's inequality; any masks whose mean is this mean are an unbiased
    estimate of it. With clean context each stride is bounded given the text before it, and bounds of factors add up to a
    bound of the product. For blocks it is the same within each block.

    `orders`: upper bound, E[-log of the mean of p(x | order) over K orders] by the same inequality, falling with K (Burda
    et al. 2016, theorem 1). It needs p(x | order) as a whole: a mean over masks inside the logarithm is no bound.

    `lower`: lower bound, E[-log q + 1 - p(x | order) / q] with q > 0 of any size that does not depend on this order: the
    concave logarithm lies below its tangent, log p <= log q + p / q - 1, and the mean of p(x | order) is p (Ivanov et al.
    2026, TUBE). With clean context each stride is bounded given the text before it, and the bounds add up. It is on -log p
    of the mixture over orders, not of any one order.

    `reconstruction`, `pseudo` (each token given all others, or a token's parts weighted like a single event): not a bound.
    Two fair bits that are always equal cost nothing given each other, and one bit in truth; two independent ones, weighted
    as one event, cost one bit, and two in truth.

    bytes_lost: bytes of the text that cannot be had back from its tokens. Where there are any, every family is `not a code
    length`: many texts have the same tokens, and what tells them apart is not charged for.
    """
    if family not in (*CODE_LENGTHS, *MEANS_OVER_ORDERS, "lower", "reconstruction", "pseudo"):
        raise ValueError(f"nothing is proven about {family!r}")
    if family in ("reconstruction", "pseudo"):
        return NOT_A_BOUND
    if bytes_lost:
        return NO_CODE_LENGTH
    if family == "lower":
        return LOWER_BOUND
    return EXACT if family in CODE_LENGTHS else UPPER_BOUND
