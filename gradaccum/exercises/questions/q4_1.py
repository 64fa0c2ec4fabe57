"""4.1: a stream of micro-batches in lists of k."""

from itertools import islice, zip_longest

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_04


def lists_made(answer, case):
    """Collect the lists before reading them: each has to be there for good. No more than `most`: it may never end."""
    found = answer(material.stream(case["micro_batches"], case["source"]), case["k"])
    lists = [each for _, each in zip(range(case["most"]), found, strict=False)]
    found = [list(each) if isinstance(each, list | tuple) else f"a {type(each).__name__}" for each in lists]
    return found if len(found) < 100 else [len(found), *found[-3:]]


def right_lists(case):
    return lesson_04.right_lists(case["micro_batches"], case["k"])


def full_lists(case):
    return [each for each in right_lists(case) if len(each) == case["k"]]


def expected_full_lists(case):
    found = full_lists(case)
    return found if len(found) < 100 else [len(found), *found[-3:]]


def numbers_read(answer, case):
    read = []
    source = (read.append(number) or number for number in range(case["number"]))
    return [len(read) for _ in zip(range(3), answer(source, case["k"]), strict=False)]


def streams(right, more, rows):
    """Make cases that ask for as many lists as there are, and some more to see whether it ends."""

    def cases(draw):
        made = [{"micro_batches": list(stream), "source": source, "k": k} for stream, source, k in rows(draw)]
        return [case | {"most": len(right(case)) + more} for case in made]

    return cases


def even(draw):
    """Number the micro-batches from 0, which no truth test may take for the end; None is one as good as any."""
    for k in (draw.randrange(2, 5), draw.randrange(5, 8)):
        yield range(k * draw.randrange(2, 4)), "list", k
    yield [7, 8, None, 9, 0, 6, "", [], -1, False], "generator", 2
    yield range(3500), "generator", 1


def uneven(draw):
    k = draw.randrange(4, 7)
    for number in (k + 2, 2 * k, k - 1, 2 * k + 1, 1, 0):
        yield range(number), "list", k
    yield range(3), "list", 1


STREAM = "micro-batches {micro_batches}, given as {source}; k = {k}"
QUESTION = Question(
    "A stream in windows",
    (
        Property(
            "full lists hold k each, in order, from a list or a generator",
            1,
            streams(full_lists, 0, even),
            lists_made,
            expected_full_lists,
            STREAM,
        ),
        Property(
            "what is left makes a last, shorter list, and no list is empty",
            1,
            streams(right_lists, 2, uneven),
            lists_made,
            right_lists,
            STREAM,
        ),
        Property(
            "nothing is read beyond the list that is yielded",
            1,
            # long enough to stand for endless
            lambda draw: [{"number": 500, "k": k} for k in (draw.randrange(2, 5), 1, draw.randrange(5, 9))],
            numbers_read,
            lambda case: [n * case["k"] for n in (1, 2, 3)],
            "a generator of {number} micro-batches, k = {k}; how many had been read when each of the first lists came",
        ),
    ),
)


def filled(begin=1, yield_rest=bool, renewed=lambda window: []):
    """Make the loop that fills a list, with one thing changed."""

    def group(micro_batches, k):
        window = []
        for number, micro_batch in enumerate(micro_batches, start=begin):
            window.append(micro_batch)
            if number % k == 0:
                yield window
                window = renewed(window)
        if yield_rest(window):
            yield window

    return group


def emptied(window):
    window.clear()
    return window


SAME_LIST = "The same list comes each time, with new contents; make a new one each time."
drops_the_last = mistake("What is left over at the end is dropped; yield it as one more, shorter list.")(
    filled(yield_rest=lambda window: False)
)
empty_at_the_end = mistake("If nothing is left over, an empty list comes last; yield the rest only if there is one.")(
    filled(yield_rest=lambda window: True)
)
first_alone = mistake("The first list is one micro-batch, as with `step % k == 0`; a list is full when it holds k.")(
    filled(begin=0)
)
cleared_after = mistake(SAME_LIST)(filled(renewed=emptied))


@mistake(SAME_LIST)
def the_same_list(micro_batches, k):
    window = []
    for each in filled()(micro_batches, k):
        window[:] = each
        yield window


@mistake("Empty lists follow without end; stop when there is nothing left to read.")
def never_ends(micro_batches, k):
    source = iter(micro_batches)
    while True:
        yield list(islice(source, k))


@mistake("Slices and `len` need a list, and a generator has neither; take from `iter` instead.")
def slices(micro_batches, k):
    return [micro_batches[start : start + k] for start in range(0, len(micro_batches), k)]


@mistake("A generator cannot be sliced or indexed; take from `iter(micro_batches)` instead.")
def sliced(micro_batches, k):
    while micro_batches:
        yield micro_batches[:k]
        micro_batches = micro_batches[k:]


@mistake(
    "From a list, the first k come again and again: each islice(micro_batches, k) starts at the beginning; make "
    "`stream = iter(micro_batches)` once, and take from that."
)
def begins_again(micro_batches, k):
    while window := list(islice(micro_batches, k)):
        yield window


@mistake("A micro-batch that is false, such as 0 or None, is taken for the end; a micro-batch may be anything.")
def falsy_ends(micro_batches, k):
    stream = iter(micro_batches)
    while first := next(stream, None):
        yield [first, *islice(stream, k - 1)]


@mistake(
    "A micro-batch that is None is taken for the end; a micro-batch may be anything, so let the loop end by "
    "itself, or compare with an `object()` of your own."
)
def none_ends(micro_batches, k):
    stream = iter(micro_batches)
    while (first := next(stream, None)) is not None:
        yield [first, *islice(stream, k - 1)]


@mistake(
    "A micro-batch that is None is left out, as if it were a filler in the last list; a micro-batch may be "
    "anything, so fill up with an `object()` of your own."
)
def none_left_out(micro_batches, k):
    for filled_up in zip_longest(*[iter(micro_batches)] * k):
        yield [each for each in filled_up if each is not None]


@mistake("The iterator of islice is yielded, which is always true and reads later; make a list: list(islice(...)).")
def islice_itself(micro_batches, k):
    stream = iter(micro_batches)
    while window := islice(stream, k):
        yield window


@mistake(
    "At the end of the stream next() raises StopIteration, which must not leave a generator; islice stops by itself."
)
def next_raises(micro_batches, k):
    stream = iter(micro_batches)
    while True:
        yield [next(stream) for _ in range(k)]


@mistake("Each list is made in a nested call, and Python allows about 1,000 of these; use a loop.")
def calls_itself(micro_batches, k):
    stream = iter(micro_batches)
    if window := list(islice(stream, k)):
        yield window
        yield from calls_itself.answer(stream, k)


@mistake("The whole stream is read before the first list comes; read k of it, yield them, go on.")
def reads_everything(micro_batches, k):
    return slices(list(micro_batches), k)


@mistake("One micro-batch more than the list has was read; yield the list as soon as it is full.")
def looks_ahead(micro_batches, k):
    source = iter(micro_batches)
    ahead = list(islice(source, 1))
    while ahead:
        window, ahead = ahead + list(islice(source, k - 1)), list(islice(source, 1))
        yield window
