"""6.2: further right answers, which must get full points, and wrong ones, which must not."""

import functools
import math
from bisect import bisect_right

import numpy as np
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


def yields(peak_of, effective_batch, budget):
    size = bisect_right(range(1, effective_batch + 1), budget, key=functools.cache(peak_of))
    while size and effective_batch:
        yield np.int64(min(size, effective_batch))
        effective_batch -= min(size, effective_batch)


def bit_by_bit(peak_of, effective_batch, budget):
    size = 0
    for bit in reversed(range(effective_batch.bit_length())):
        if size + 2**bit <= effective_batch and peak_of(size + 2**bit) <= budget:
            size += 2**bit
    return np.diff([*range(0, effective_batch, size), effective_batch]) if size else np.array([])


def yields_after_trying_all(peak_of, effective_batch, budget):
    size = sum(peak_of(each) <= budget for each in range(1, effective_batch + 1))
    while size and effective_batch:
        yield min(size, effective_batch)
        effective_batch -= min(size, effective_batch)


def in_strides(peak_of, effective_batch, budget):
    size, stride = 0, math.isqrt(effective_batch)
    while size + stride <= effective_batch and peak_of(size + stride) <= budget:
        size += stride
    while size < effective_batch and peak_of(size + 1) <= budget:
        size += 1
    return plan_of(size, effective_batch)


def beyond_the_batch(peak_of, effective_batch, budget):
    """Asks for peaks of more samples than there are, which in earnest is no memory left."""
    most = 1
    while peak_of(most) <= budget:
        most *= 2
    return list(by_bisect(peak_of, min(most, effective_batch), budget))


def plan_of(size, effective_batch):
    return list(by_bisect(lambda n: n, effective_batch, size))


def halvings(rounds):
    def answer(peak_of, effective_batch, budget):
        fits, too_large = 0, effective_batch + 1
        for _ in range(rounds(effective_batch)):
            middle = (fits + too_large) // 2
            fits, too_large = (middle, too_large) if middle and peak_of(middle) <= budget else (fits, middle)
        return plan_of(fits, effective_batch)

    return answer


def between_one_and_all(end):
    """Searches between 1 and all, and takes the lower or the upper end."""

    def answer(peak_of, effective_batch, budget):
        low, high = 1, effective_batch
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if peak_of(middle) <= budget else (low, middle)
        return plan_of((low, high)[end], effective_batch)

    return answer


def changed(change):
    """Change the right plan, by (the plan, the size, the effective batch)."""

    def answer(peak_of, effective_batch, budget):
        plan = list(by_bisect(peak_of, effective_batch, budget))
        return change(plan, max(plan, default=0), effective_batch)

    return answer


def whole_and_rest(plan, size, samples):
    return [size] * (samples // size) + [samples % size]


def everything_at_once(peak_of, effective_batch, budget):
    return [effective_batch] if peak_of(effective_batch) <= budget else []


def remembered(peak_of, effective_batch, budget):
    """The sizes of one seed."""
    known = {256: 186, 100: 99, 50: 15, 10_000: 7_001, 30_001: 20_001, 1: 1}
    return plan_of(known.get(effective_batch, effective_batch // 5), effective_batch)


def all_tried_rest_dropped(peak_of, effective_batch, budget):
    size = sum(peak_of(each) <= budget for each in range(1, effective_batch + 1))
    return [size] * (effective_batch // size) if size else []


RIGHT = [
    doubles_then_narrows,
    by_bisect,
    recursive,
    yields,
    bit_by_bit,
    halvings(lambda samples: samples.bit_length()),
    changed(lambda plan, size, samples: map(float, plan)),
]
WRONG = [
    everything_at_once,
    beyond_the_batch,
    remembered,
    *(halvings(lambda samples, rounds=rounds: rounds) for rounds in (8, 9, 10, 11, 12)),
    halvings(lambda samples: int(math.log2(samples))),
    between_one_and_all(1),
    changed(lambda plan, size, samples: size),
    changed(lambda plan, size, samples: list(map(str, plan))),
    changed(lambda plan, size, samples: [plan]),
    changed(lambda plan, size, samples: (size, len(plan))),
]
NAMED = [
    (yields_after_trying_all, "sample_by_sample"),
    (in_strides, "sample_by_sample"),
    (all_tried_rest_dropped, "rounded_down", "sample_by_sample"),
    (changed(lambda plan, size, samples: plan[::-1]), "shorter_first"),
    (changed(lambda plan, size, samples: plan or None), "none_where_nothing_fits"),
    (changed(lambda plan, size, samples: print(plan)), "returns_nothing"),
    (changed(lambda plan, size, samples: plan if samples // size else []), "divides_by_zero"),
    (changed(whole_and_rest), "zero_at_the_end", "divides_by_zero"),
    (between_one_and_all(0), "never_whole", "single_anyway"),
    (changed(lambda plan, size, samples: plan or [0]),),
]
