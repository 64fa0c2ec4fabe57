"""4.1: further right answers, which must get full points, and wrong ones, which must not."""

from collections import deque
from itertools import chain, count, islice, takewhile, zip_longest


def collects(micro_batches, k):
    window = []
    for micro_batch in micro_batches:
        window.append(micro_batch)
        if len(window) == k:
            yield tuple(window)
            window = []
    if window:
        yield tuple(window)


def until_empty(micro_batches, k):
    stream = iter(micro_batches)
    return iter(lambda: list(islice(stream, k)), [])


def first_and_rest(micro_batches, k):
    stream = iter(micro_batches)
    for first in stream:
        yield list(chain([first], islice(stream, k - 1)))


def fills_up(micro_batches, k):
    nothing = object()
    for filled in zip_longest(*[iter(micro_batches)] * k, fillvalue=nothing):
        yield [each for each in filled if each is not nothing]


def asks_for_the_end(micro_batches, k):
    stream, end, window = iter(micro_batches), object(), []
    while (each := next(stream, end)) is not end:
        window.append(each)
        if len(window) >= k:
            yield list(window)
            window.clear()
    if len(window) > 0:
        yield window


def catches_the_end(micro_batches, k):
    stream, more = iter(micro_batches), True
    while more:
        window = []
        try:
            while len(window) < k:
                window.append(next(stream))
        except StopIteration:
            more = False
        if window:
            yield window


def takes_while(micro_batches, k):
    stream = iter(micro_batches)
    return takewhile(bool, (tuple(islice(stream, k)) for _ in count()))


def from_a_deque(micro_batches, k):
    held = deque()
    for each in micro_batches:
        held.append(each)
        if len(held) == k:
            yield [held.popleft() for _ in range(k)]
    if held:
        yield list(held)


class IsAnIterator:
    def __init__(self, micro_batches, k):
        self.stream, self.k = iter(micro_batches), k

    def __iter__(self):
        return self

    def __next__(self):
        window = list(islice(self.stream, self.k))
        if not window:
            raise StopIteration
        return window


def none_breaks(micro_batches, k):
    stream, window = iter(micro_batches), []
    while True:
        each = next(stream, None)
        if each is None:
            break
        window.append(each)
        if len(window) == k:
            yield window
            window = []
    if window:
        yield window


def none_skipped(micro_batches, k):
    yield from collects((each for each in micro_batches if each is not None), k)


def any_of_the_rest(micro_batches, k):
    for window in collects(micro_batches, k):
        if len(window) == k or any(window):
            yield window


def flattens(micro_batches, k):
    yield from collects(chain.from_iterable(x if isinstance(x, list) else [x] for x in micro_batches), k)


def fills_up_with(nothing):
    def group(micro_batches, k):
        stream = [iter(micro_batches)] * k
        return ([x for x in filled if x != nothing] for filled in zip_longest(*stream, fillvalue=nothing))

    return group


def as_equal_as_can_be(micro_batches, k):
    micro_batches = list(micro_batches)
    if micro_batches:
        windows = -(-len(micro_batches) // k)
        yield from collects(micro_batches, -(-len(micro_batches) // windows))


def rest_joins_the_last(micro_batches, k):
    *windows, last = [[], *collects(micro_batches, k)]
    return [*windows[1:-1], windows[-1] + last] if len(windows) > 1 and len(last) < k else [*windows[1:], last]


def yields_in_the_next_round(micro_batches, k):
    window = []
    for each in micro_batches:
        if len(window) == k:
            yield window
            window = []
        window.append(each)
    if window:
        yield window


def never_begins_anew(micro_batches, k):
    window = []
    for each in micro_batches:
        window.append(each)
        if len(window) == k:
            yield window


def leaves_off_at_the_end(micro_batches, k):
    stream = iter(micro_batches)
    while True:
        window = []
        for _ in range(k):
            try:
                window.append(next(stream))
            except StopIteration:
                return
        yield window


def by_index(micro_batches, k):
    last = len(micro_batches)
    return [[micro_batches[i] for i in range(start, min(start + k, last))] for start in range(0, last, k)]


RIGHT = [
    collects,
    until_empty,
    first_and_rest,
    fills_up,
    asks_for_the_end,
    catches_the_end,
    takes_while,
    from_a_deque,
    IsAnIterator,
]
WRONG = [
    none_skipped,
    any_of_the_rest,
    flattens,
    as_equal_as_can_be,
    rest_joins_the_last,
    never_begins_anew,
    *map(fills_up_with, [0, -1, "", False, []]),
    lambda micro_batches, k: None,
    lambda micro_batches, k: [list(micro_batches)],
    lambda micro_batches, k: [list(micro_batches)[start::k] for start in range(k)],
]
NAMED = [
    (none_breaks, "none_ends"),
    (lambda micro_batches, k: list(fills_up_with(None)(micro_batches, k)), "none_left_out", "reads_everything"),
    (lambda micro_batches, k: zip(*[iter(micro_batches)] * k, strict=False), "drops_the_last"),
    (yields_in_the_next_round, "looks_ahead"),
    (leaves_off_at_the_end, "drops_the_last"),
    (by_index, "slices"),
    (as_equal_as_can_be, "reads_everything", ...),
    (any_of_the_rest,),
]
