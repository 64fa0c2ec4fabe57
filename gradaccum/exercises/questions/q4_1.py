"""4.1: a stream of micro-batches in lists of k."""

from itertools import islice

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake
from gradaccum.exercises.questions import lesson_04


def lists_made(answer, case):
    """Collect the lists before reading them: each has to be there for good. No more than `most`: it may never end."""
    found = answer(material.stream(range(case["number"]), case["source"]), case["k"])
    lists = [each for _, each in zip(range(case["most"]), found, strict=False)]
    return [list(each) if isinstance(each, list | tuple) else f"a {type(each).__name__}" for each in lists]


def right_lists(case):
    return lesson_04.right_lists(range(case["number"]), case["k"])


def full_lists(case):
    return [each for each in right_lists(case) if len(each) == case["k"]]


def numbers_read(answer, case):
    read = []
    source = (read.append(number) or number for number in range(case["number"]))
    return [len(read) for _ in zip(range(3), answer(source, case["k"]), strict=False)]


def streams(right, more, *rows):
    """Make cases that ask for as many lists as there are, and some more to see whether it ends."""

    def cases(draw):
        made = [{"number": number, "k": k, "source": source} for number, k, source in rows]
        return [case | {"most": len(right(case)) + more} for case in made]

    return cases


EVEN = streams(full_lists, 0, (6, 3, "list"), (4, 2, "generator"), (5, 1, "generator"), (7000, 2, "generator"))
UNEVEN = streams(right_lists, 2, (7, 3, "list"), (6, 3, "list"), (3, 4, "list"), (0, 2, "list"), (3, 1, "list"))
STREAM = "{number} micro-batches, numbered from 0, given as {source}; k = {k}"
QUESTION = Question(
    "A stream in windows",
    (
        Property(
            "full lists hold k each, in order, from a list or a generator", 1, EVEN, lists_made, full_lists, STREAM
        ),
        Property(
            "what is left makes a last, shorter list, and no list is empty", 1, UNEVEN, lists_made, right_lists, STREAM
        ),
        Property(
            "nothing is read beyond the list that is yielded",
            1,
            lambda draw: [{"number": 500, "k": k} for k in (3, 1, 8)],  # long enough to stand for endless
            numbers_read,
            lambda case: [n * case["k"] for n in (1, 2, 3)],
            "a generator of {number} micro-batches, k = {k}; how many had been read when each of the first lists came",
        ),
    ),
)


def filled(begin=1, yield_rest=bool):
    """Make the loop that fills a list, with one thing changed."""

    def group(micro_batches, k):
        window = []
        for number, micro_batch in enumerate(micro_batches, start=begin):
            window.append(micro_batch)
            if number % k == 0:
                yield window
                window = []
        if yield_rest(window):
            yield window

    return group


drops_the_last = mistake("What is left over at the end is dropped; it makes one more list, a shorter one.")(
    filled(yield_rest=lambda window: False)
)

empty_at_the_end = mistake(
    "Where nothing is left over, an empty list comes last; yield the rest only if there is one."
)(filled(yield_rest=lambda window: True))


@mistake("Empty lists follow without end; stop when there is nothing left to read.")
def never_ends(micro_batches, k):
    source = iter(micro_batches)
    while True:
        yield list(islice(source, k))


first_alone = mistake("The first list is one micro-batch, as with `step % k == 0`; a list is full when it holds k.")(
    filled(begin=0)
)


@mistake("Slices and `len` need a list, and a generator has neither; take from `iter` instead.")
def slices(micro_batches, k):
    return [micro_batches[start : start + k] for start in range(0, len(micro_batches), k)]


@mistake("The same list comes each time, with new contents; make a new one each time.")
def the_same_list(micro_batches, k):
    window = []
    for each in filled()(micro_batches, k):
        window[:] = each
        yield window


@mistake("The whole stream is read before the first list comes; read k of it, yield them, go on.")
def reads_everything(micro_batches, k):
    return slices(list(micro_batches), k)


@mistake("One more than the list holds has been read; yield the list as soon as it is full.")
def looks_ahead(micro_batches, k):
    source = iter(micro_batches)
    ahead = list(islice(source, 1))
    while ahead:
        window, ahead = ahead + list(islice(source, k - 1)), list(islice(source, 1))
        yield window
