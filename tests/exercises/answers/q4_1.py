"""4.1: further right answers, which must get full points, and wrong ones, which must not."""

from itertools import islice, zip_longest


def collects(micro_batches, accumulation_steps):
    window = []
    for micro_batch in micro_batches:
        window.append(micro_batch)
        if len(window) == accumulation_steps:
            yield tuple(window)
            window = []
    if window:
        yield tuple(window)


def until_empty(micro_batches, accumulation_steps):
    stream = iter(micro_batches)
    return iter(lambda: list(islice(stream, accumulation_steps)), [])


def first_and_rest(micro_batches, accumulation_steps):
    stream = iter(micro_batches)
    for first in stream:
        yield [first, *islice(stream, accumulation_steps - 1)]


def fills_up(micro_batches, accumulation_steps):
    nothing = object()
    for filled in zip_longest(*[iter(micro_batches)] * accumulation_steps, fillvalue=nothing):
        yield [each for each in filled if each is not nothing]


def until_falsy(micro_batches, k):
    stream = iter(micro_batches)
    while first := next(stream, None):
        yield [first, *islice(stream, k - 1)]


def calls_itself(micro_batches, k):
    stream = iter(micro_batches)
    if window := list(islice(stream, k)):
        yield window
        yield from calls_itself(stream, k)


def slices_of_the_stream(micro_batches, k):
    stream = iter(micro_batches)
    return (islice(stream, k) for _ in range(100))


RIGHT = [collects, until_empty, first_and_rest, fills_up]
WRONG = [
    slices_of_the_stream,
    until_falsy,
    calls_itself,
    lambda micro_batches, k: None,
    lambda micro_batches, k: [list(micro_batches)],
    lambda micro_batches, k: [list(micro_batches)[start::k] for start in range(k)],
]
