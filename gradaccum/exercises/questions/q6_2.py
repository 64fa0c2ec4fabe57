"""6.2: the sizes of a window: the largest micro-batches that fit into a budget, the sum exact."""

from bisect import bisect_right

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake


def situation(fewest, most, times=1, left=False, of=0, flat=0, step=1):
    """Return what draws a case: the micro-batch that just fits (0: none), by its bounds, and how the peak grows.

    The effective batch is `of`, or `times` that micro-batch, with some samples `left` or not. The peak is `flat` up
    to a size, and rises every `step` samples.
    """

    def case(draw, exactly):
        fitting = step * draw.randint(fewest // step, most // step)
        samples = of or fitting * times + (draw.randrange(1, fitting) if left else 0)
        base, each = draw.randrange(100, 1000), draw.randrange(10, 99)
        peak = {"base": base, "for each sample": each}
        peak |= {"in steps of": step} if step > 1 else {}
        peak |= {"flat up to": flat} if flat else {}
        room = 0 if exactly else each // 2
        budget = material.peak_of(peak, samples)(fitting) + room if fitting else base + draw.randrange(each)
        return {"effective_batch": samples, "peak": peak, "budget": budget}

    return case


def planned(answer, case):
    sizes = answer(material.peak_of(case["peak"], case["effective_batch"]), case["effective_batch"], case["budget"])
    if sizes is None:
        return None
    plain = [material.plain_number(size) for size in sizes] if hasattr(sizes, "__iter__") else ["none"]
    if not all(isinstance(size, int | float) for size in plain):
        raise TypeError(f"A plan is a list of ints, one for each micro-batch, and this returned {sizes!r:.80}.")
    return {"samples in all": sum(plain), "largest micro-batch": max(plain), "sizes": plain} if plain else []


def one_by_one(case):
    samples, peak_of = case["effective_batch"], material.peak_of(case["peak"], case["effective_batch"])
    fitting = [size for size in range(1, samples + 1) if peak_of(size) <= case["budget"]]
    sizes = []
    while fitting and sum(sizes) < samples:
        sizes.append(min(fitting[-1], samples - sum(sizes)))
    return {"samples in all": samples, "largest micro-batch": sizes[0], "sizes": sizes} if sizes else []


def calls(answer, case):
    peak_of, asked = material.peak_of(case["peak"], case["effective_batch"]), []

    def counted(micro_batch):
        asked.append(micro_batch)
        return peak_of(micro_batch)

    sizes = answer(counted, case["effective_batch"], case["budget"])
    list(sizes if hasattr(sizes, "__iter__") else [])  # a generator has not asked before
    return len(asked)


TRIED = "effective batch {effective_batch}, budget {budget}, and a peak with {peak}"
EQUAL = "where it divides the effective batch, the largest micro-batch alone"
WHOLE = (
    *(situation(7, 15, times=5), situation(20, 40), situation(16, 28, times=3, flat=8, step=4)),
    *(situation(1, 1, times=21), situation(1, 1), situation(9, 13, times=3, flat=4)),
)
SHORTER = (
    *(situation(130, 190, of=256), situation(9, 15, times=5, left=True, flat=5), situation(99, 99, of=100)),
    *(situation(80, 120, times=2, left=True, flat=20, step=8), situation(15, 15, of=50, flat=15, step=5)),
    # So many that a search of a few rounds ends too early.
    *(situation(5_001, 9_999, of=10_000), situation(16_000, 29_000, of=30_001, step=3)),
    *(situation(9_000, 14_000, times=2, left=True), situation(3_000, 5_000, times=5, left=True)),
)
NONE = situation(0, 0, of=50), situation(0, 0, of=1), situation(0, 0, of=24, flat=3, step=4)
MANY = (
    *(situation(5_001, 9_999, of=10_000), situation(2_000, 4_000, of=10_000, flat=1_000)),
    *(situation(10_000, 10_000, of=10_000, step=64), situation(2, 9, of=10_000)),
)


def plans(name, points, situations, probe=planned, expected=one_by_one, **more):
    def cases(draw):
        return [each(draw, exactly=index % 2 == 0) for index, each in enumerate(situations)]

    return Property(name, points, cases, probe, expected, TRIED, **more)


QUESTION = Question(
    "The largest micro-batch in a budget",
    (
        plans(EQUAL, 1, WHOLE),
        plans("where it does not, a shorter one at the end keeps the effective batch exact", 2, SHORTER),
        plans("an empty list where not even one sample fits", 1, NONE, after=EQUAL),
        plans(
            "at most 40 calls of peak_of for 10,000 samples",
            *(1, MANY, calls, lambda case: 40),
            judge=material.at_most("calls"),
            after=EQUAL,
            by_value=False,
        ),
    ),
)


def largest(peak_of, most, budget):
    return bisect_right(range(1, most + 1), budget, key=peak_of)


def cut(effective_batch, size):
    whole, rest = divmod(effective_batch, size) if size else (0, 0)
    return [size] * whole + [rest] * (rest > 0)


def right_plan(peak_of, effective_batch, budget):
    return cut(effective_batch, largest(peak_of, effective_batch, budget))


def changed(sentence, change):
    """Make the mistake that changes the right plan, by the largest size and the effective batch."""

    def answer(peak_of, effective_batch, budget):
        size = largest(peak_of, effective_batch, budget)
        return change(cut(effective_batch, size), size, effective_batch) if size else []

    return mistake(sentence)(answer)


sample_by_sample = mistake(
    "More than 40 calls of peak_of: keep a size that fits and one that is too large, and try the middle between them, "
    "each size once; a call halves what is left."
)(lambda peak_of, samples, budget: cut(samples, sum(peak_of(size) <= budget for size in range(1, samples + 1))))
rounded_down = changed(
    "The samples that are left over are dropped, so the effective batch shrinks; they make a shorter last one.",
    lambda plan, size, samples: [size] * (samples // size),
)
last_too_large = changed(
    "The last micro-batch is a whole one, so the effective batch grows; it holds only the samples that are left.",
    lambda plan, size, samples: [size] * len(plan),
)
rest_on_top = changed(
    "The remaining samples are added to the last micro-batch, which then exceeds the budget.",
    lambda plan, size, samples: [*plan[:-2], sum(plan[-2:])] if plan[-1] < size else plan,
)
shorter_first = changed(
    "The smaller micro-batch comes first; it belongs at the end.",
    lambda plan, size, samples: plan[::-1],
)
zero_at_the_end = changed(
    "If the size divides the effective batch, the plan has a micro-batch of 0 samples at its end; leave it out.",
    lambda plan, size, samples: [size] * (samples // size) + [samples % size],
)
evenly = changed(
    "The samples are spread evenly; use micro-batches of the largest size, and a shorter one at the end.",
    lambda plan, size, samples: [samples // len(plan) + (n < samples % len(plan)) for n in range(len(plan))],
)
evenly_but_the_last = changed(evenly.sentence, lambda plan, size, samples: cut(samples, -(-samples // len(plan))))

divisors_only = changed(
    "Only divisors of the effective batch are tried; a larger micro-batch fits, with a shorter one at the end.",
    lambda plan, size, samples: cut(samples, max(n for n in range(1, size + 1) if samples % n == 0)),
)
powers_of_two = changed(
    "Only powers of two are tried; the largest micro-batch may be any whole number.",
    lambda plan, size, samples: cut(samples, 1 << size.bit_length() - 1),
)
halves_only = changed(
    "Only the effective batch, its half, the half of that and so on are tried; a larger size in between may fit.",
    lambda plan, size, samples: cut(samples, next(samples >> n for n in range(99) if samples >> n <= size)),
)
one_too_many = changed(
    "The micro-batch is the first that does not fit; one sample less is the last that does.",
    lambda plan, size, samples: cut(samples, min(size + 1, samples)),
)
below_budget = mistake("A peak exactly equal to the budget is rejected, but it fits.")(
    lambda peak_of, samples, budget: right_plan(peak_of, samples, budget - 1)
)
whole = mistake("The whole effective batch as one micro-batch is never tried.")
never_whole = whole(lambda peak_of, samples, budget: cut(samples, largest(peak_of, samples - 1, budget)))
whole_if_single = whole(lambda peak_of, samples, budget: cut(samples, largest(peak_of, max(1, samples - 1), budget)))


@mistake("The peak is taken for a straight line through two of its points; it may have flat parts and steps.")
def straight_line(peak_of, effective_batch, budget):
    each = (peak_of(effective_batch) - peak_of(1)) / max(effective_batch - 1, 1) or 1
    fits = int(1 + (budget - peak_of(1)) // each)
    return cut(effective_batch, min(max(fits, 0), effective_batch))


single_anyway = mistake(
    "Micro-batches of one sample are planned even if not even one sample fits; the plan is then an empty list."
)(lambda peak_of, samples, budget: cut(samples, largest(peak_of, samples, budget) or 1))
divides_by_zero = mistake(
    "If not even one sample fits, the answer divides by a size of 0; return an empty list before that."
)(
    lambda peak_of, samples, budget: (
        samples // largest(peak_of, samples, budget) and right_plan(peak_of, samples, budget)
    )
)
none_where_nothing_fits = mistake(
    "If not even one sample fits, nothing or None is returned; the plan is then an empty list."
)(lambda *situation: right_plan(*situation) or None)
returns_nothing = mistake("Nothing is returned; return the list of the sizes.")(lambda *situation: None)
