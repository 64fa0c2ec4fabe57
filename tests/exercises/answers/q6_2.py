"""6.2: further right answers, which must get full points, and wrong ones, which must not."""

from bisect import bisect_right

import torch


def doubles_then_narrows(peak_of, effective_batch, budget):
    size, jump = 0, 1
    while jump:
        if size + jump <= effective_batch and peak_of(size + jump) <= budget:
            size, jump = size + jump, jump * 2
        else:
            jump //= 2
    window = []
    while size and sum(window) < effective_batch:
        window.append(min(size, effective_batch - sum(window)))
    return tuple(window)


def by_bisect(peak_of, effective_batch, budget):
    fitting = bisect_right(range(1, effective_batch + 1), budget, key=peak_of)
    return (len(each) for each in torch.arange(effective_batch).split(fitting)) if fitting else ()


def recursive(peak_of, effective_batch, budget):
    def search(low, high):
        if low == high:
            return low
        middle = (low + high + 1) // 2
        return search(middle, high) if peak_of(middle) <= budget else search(low, middle - 1)

    size = search(0, effective_batch)
    whole, rest = divmod(effective_batch, size) if size else (0, 0)
    return torch.tensor([size] * whole + [rest] * (rest > 0))


def shorter_one_first(peak_of, effective_batch, budget):
    return list(recursive(peak_of, effective_batch, budget))[::-1]


def beyond_the_batch(peak_of, effective_batch, budget):
    """Asks for peaks of more samples than there are, which in earnest is no memory left."""
    most = 1
    while peak_of(most) <= budget:
        most *= 2
    return list(by_bisect(peak_of, min(most, effective_batch), budget))


def nine_halvings(peak_of, effective_batch, budget):
    fits, too_large = 0, effective_batch + 1
    for _ in range(9):
        middle = (fits + too_large) // 2
        fits, too_large = (middle, too_large) if middle and peak_of(middle) <= budget else (fits, middle)
    return list(by_bisect(lambda n: n, effective_batch, fits))


def size_alone(peak_of, effective_batch, budget):
    return max(by_bisect(peak_of, effective_batch, budget), default=0)


def halves_only(peak_of, effective_batch, budget):
    size = effective_batch
    while size and peak_of(size) > budget:
        size //= 2
    return list(by_bisect(lambda n: n, effective_batch, size))


def everything_at_once(peak_of, effective_batch, budget):
    return [effective_batch] if peak_of(effective_batch) <= budget else []


def none_where_nothing_fits(peak_of, effective_batch, budget):
    return list(by_bisect(peak_of, effective_batch, budget)) or None


RIGHT = [doubles_then_narrows, by_bisect, recursive]
WRONG = [
    shorter_one_first,
    halves_only,
    everything_at_once,
    none_where_nothing_fits,
    beyond_the_batch,
    nine_halvings,
    size_alone,
    lambda *question: list(map(str, by_bisect(*question))),
]
