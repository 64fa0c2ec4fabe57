"""The audits of 5.6: what loops do, the weights that this gives, and windows drawn for them."""

from math import prod

RIGHT = "divides sums by the count"
LOOPS = {  # what a loop does; the audit's name of it, and the line that mends it
    RIGHT: ("right", "F"),
    "adds means": ("not divided", "A"),
    "adds sums": ("not divided", "A"),
    "divides means by the length": ("each mean over k", "A"),
    "divides means by k": ("a partial window over k", "A"),  # in a window that has fewer
    "clears before backward": ("only the last micro-batch", "D"),
    "clips after backward": ("clipped or divided inside", "E"),
}


def weights_of(loop, counts, k, kept=()):
    """Return a window's weights; each clipping keeps a share of what is collected so far."""
    total, many = sum(counts), len(counts)
    right = [count / total for count in counts]
    return {
        RIGHT: right,
        "adds means": [1.0] * many,
        "adds sums": [float(count) for count in counts],
        "divides means by the length": [1 / many] * many,
        "divides means by k": [1 / k] * many,
        "clears before backward": [0.0] * (many - 1) + right[-1:],
        "clips after backward": [share * prod(kept[index:]) for index, share in enumerate(right)],
    }[loop]


def clipped(draw, counts, k):
    """Draw what each clipping keeps, such that the weights add up to what those of another fault do."""
    right = weights_of(RIGHT, counts, k)
    kept = [draw.uniform(0.5, 0.9) for _ in counts]
    kept[-1] = 1.0
    aim = len(counts) / k if len(counts) < k else right[-1]  # of a partial window over k, of the last alone
    kept[-1] = aim / sum(weights_of("clips after backward", counts, k, kept))
    return kept


def audited(draw, loop, many, alike):
    """Draw a window's counts, and its weights as measured.

    What is not equal differs by 0.01, for every loop, and nothing is near the edge where a digit is rounded.
    """
    while True:
        k = draw.randrange(3, 7)
        length = {"all": k, "fewer": draw.randrange(2, k), "one": 1}[many]
        most = draw.randrange(4, 10)
        counts = [most if alike != "unequal" else draw.randint(1, most) for _ in range(length)]
        if alike == "nearly":
            counts[::2] = [most + 1] * len(counts[::2])
        if alike == "empty":
            counts[:-1] = [0] * (length - 1)
        kept = clipped(draw, counts, k)
        exact, right = (weights_of(each, counts, k, kept) for each in (loop, RIGHT))
        others = [weights_of(each, counts, k, kept) for each in LOOPS]
        pairs = [pair for other in others for pair in zip(exact, other, strict=True)]
        apart = all(abs(one - other) < 1e-9 or abs(one - other) > 0.0101 for one, other in pairs)
        steady = all(abs(10**n * one % 1 - 0.5) > 0.02 for pair in pairs for one in pair for n in (2, 3, 4))
        far = max(abs(one - other) for one, other in zip(exact, right, strict=True))
        as_asked = (far > 0) == (loop != RIGHT) and (alike != "nearly" or far < 0.02)
        if alike == "unequal":
            as_asked &= length == 1 or len(set(counts)) > 1
        if loop == "clips after backward":
            as_asked &= kept[-1] < 0.95 and (alike == "equal" or exact != sorted(exact))
        if apart and steady and as_asked:
            off = [draw.choice([-1, 1]) * draw.uniform(0.3, 1) for _ in exact]
            weights = [one + by * (1e-6 * one or 1e-8) for one, by in zip(exact, off, strict=True)]
            weights = [weight if count else 0.0 for weight, count in zip(weights, counts, strict=True)]
            return {"loop": loop, "weights": weights, "counts": counts, "k": k}
