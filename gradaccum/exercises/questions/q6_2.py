"""6.2: the sizes of a window: the largest micro-batches that fit into a budget, the sum exact."""

from bisect import bisect_right

from gradaccum.exercises import material
from gradaccum.exercises.question import Property, Question, mistake


def peak_of_case(case):
    return material.peak_of(case["peak"], case["effective_batch"])


def planning(*rows):
    """Make cases of an effective batch, the micro-batch that just fits, and how the peak grows."""

    def cases(draw):
        found = []
        for samples, fitting, least, step in rows:
            base, each = draw.randrange(100, 1000), draw.randrange(10, 99)
            peak = {"base": base, "for each sample": each}
            peak |= {"in steps of": step} if step > 1 else {}
            peak |= {"flat up to": least} if least else {}
            case = {"effective_batch": samples, "peak": peak}
            room = len(found) % 2 * (each // 2)  # every other budget is met exactly
            budget = peak_of_case(case)(fitting) + room if fitting else base + draw.randrange(each)
            found.append({**case, "budget": budget})
        return found

    return cases


def planned(answer, case):
    sizes = answer(material.peak_of(case["peak"], case["effective_batch"]), case["effective_batch"], case["budget"])
    if sizes is None:
        return None
    plain = [material.plain_number(size) for size in sizes] if hasattr(sizes, "__iter__") else ["none"]
    if not all(isinstance(size, int | float) for size in plain):
        raise TypeError(f"A plan is a list of ints, one for each micro-batch, and this returned {sizes!r:.80}.")
    return {"samples in all": sum(plain), "largest micro-batch": max(plain), "sizes": plain} if plain else []


def one_by_one(case):
    samples, peak_of = case["effective_batch"], peak_of_case(case)
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

    answer(counted, case["effective_batch"], case["budget"])
    return len(asked)


SITUATION = "effective batch {effective_batch}, budget {budget}, and a peak with {peak}"


def plans(name, points, *rows, after=""):
    return Property(name, points, planning(*rows), planned, one_by_one, SITUATION, after=after)


EQUAL = "where it divides the effective batch, the largest micro-batch alone"
QUESTION = Question(
    "The largest micro-batch in a budget",
    (
        plans(EQUAL, 1, (60, 12, 0, 1), (35, 35, 0, 1), (48, 16, 8, 4), (21, 1, 0, 1), (1, 1, 0, 1), (33, 11, 4, 1)),
        plans(
            "where it does not, a shorter one at the end keeps the effective batch exact",
            2,
            *(
                (256, 186, 0, 1),
                (61, 12, 5, 1),
                (256, 96, 20, 8),
                (100, 99, 0, 1),
                (50, 15, 15, 5),
                (10**4, 7001, 0, 1),
            ),
        ),
        plans(
            "an empty list where not even one sample fits", 1, (50, 0, 0, 1), (1, 0, 0, 1), (24, 0, 3, 4), after=EQUAL
        ),
        Property(
            "at most 40 calls of peak_of for 10,000 samples",
            1,
            planning((10_000, 7_001, 0, 1), (10_000, 3_000, 1_000, 1), (10_000, 10_000, 0, 64), (10_000, 2, 0, 1)),
            calls,
            lambda case: 40,
            SITUATION,
            material.at_most("calls"),
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


@mistake("The plan is right, but every micro-batch is tried in turn; halve the range that is left instead.")
def sample_by_sample(peak_of, effective_batch, budget):
    return cut(effective_batch, sum(peak_of(size) <= budget for size in range(1, effective_batch + 1)))


@mistake("The samples that are left over are dropped, so the effective batch shrinks; they make a shorter last one.")
def rounded_down(peak_of, effective_batch, budget):
    size = largest(peak_of, effective_batch, budget)
    return [size] * (effective_batch // size) if size else []


@mistake("The last micro-batch is a whole one, so the effective batch grows; it holds only the samples that are left.")
def last_too_large(peak_of, effective_batch, budget):
    size = largest(peak_of, effective_batch, budget)
    return [size] * -(-effective_batch // size) if size else []


@mistake("The samples that are left are put on top of the last micro-batch, which then is over the budget.")
def rest_on_top(peak_of, effective_batch, budget):
    sizes = right_plan(peak_of, effective_batch, budget)
    return [*sizes[:-2], sizes[-2] + sizes[-1]] if len(sizes) > 1 and sizes[-1] < sizes[0] else sizes


@mistake("Only divisors of the effective batch are tried; a larger micro-batch fits, with a shorter one at the end.")
def divisors_only(peak_of, effective_batch, budget):
    size = largest(peak_of, effective_batch, budget)
    return cut(effective_batch, max((n for n in range(1, size + 1) if effective_batch % n == 0), default=0))


@mistake("Only powers of two are tried; the largest micro-batch may be any whole number.")
def powers_of_two(peak_of, effective_batch, budget):
    size = largest(peak_of, effective_batch, budget)
    return cut(effective_batch, 1 << size.bit_length() - 1 if size else 0)


@mistake("A peak that is the budget exactly is refused; it fits.")
def below_budget(peak_of, effective_batch, budget):
    return right_plan(peak_of, effective_batch, budget - 1)


@mistake("The micro-batch is the first that does not fit; one sample less is the last that does.")
def one_too_many(peak_of, effective_batch, budget):
    size = largest(peak_of, effective_batch, budget)
    return cut(effective_batch, min(size + 1, effective_batch) if size else 0)


@mistake("The whole effective batch as one micro-batch is never tried.")
def never_whole(peak_of, effective_batch, budget):
    return cut(effective_batch, largest(peak_of, effective_batch - 1, budget))


@mistake("The peak is taken for a straight line through two of its points; it may have flat parts and steps.")
def straight_line(peak_of, effective_batch, budget):
    each = (peak_of(effective_batch) - peak_of(1)) / max(effective_batch - 1, 1) or 1
    fits = int(1 + (budget - peak_of(1)) // each)
    return cut(effective_batch, min(max(fits, 0), effective_batch))


@mistake("The samples are spread evenly; asked for are micro-batches of the largest size, and one shorter at the end.")
def evenly(peak_of, effective_batch, budget):
    steps = len(right_plan(peak_of, effective_batch, budget))
    return [effective_batch // steps + (step < effective_batch % steps) for step in range(steps)]


@mistake("Micro-batches of one sample are planned where not even one sample fits; there the plan is an empty list.")
def single_anyway(peak_of, effective_batch, budget):
    return cut(effective_batch, max(1, largest(peak_of, effective_batch, budget)))
