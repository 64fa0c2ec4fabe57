"""Lesson 3, normalize: the questions, their oracles and their known mistakes."""

import copy

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradaccum.exercises.material import at_most_bytes, classifier, gradient, joined, measure_memory, samples, weights
from gradaccum.exercises.question import Difference, Property, Question

# --------------------------------------------------------------------- 3.1: one window, normalized


def window_gradient(answer, case):
    model, window = classifier(case["seed"]), samples(case["sizes"], case["seed"])
    before = weights(model)
    answer(model, window)
    found = {"gradient": gradient(model), "weights changed": weights(model) != before}
    model.zero_grad()
    answer(model, window)  # as in a second epoch: an answer may not spoil its data or the model
    return found | {"gradient of a second call": gradient(model)}


def full_gradient(case):
    model = classifier(case["seed"])
    inputs, targets = joined(samples(case["sizes"], case["seed"]))
    cross_entropy(model(inputs), targets).backward()
    return {"gradient": gradient(model), "weights changed": False, "gradient of a second call": gradient(model)}


def equal_windows(draw):
    shapes = [(2, 3), (5, 1), (3, 4), (4, 2), (8, 64)]  # k and the size: no single number serves them all
    return [{"sizes": [size] * k, "seed": draw.randrange(10**6)} for k, size in shapes]


def window_peak(answer, case):
    model = classifier(case["seed"])
    window = samples(case["sizes"], case["seed"])
    with measure_memory(model, window) as memory:
        answer(model, window)
    return memory.peak_bytes - memory.start_bytes


def one_at_a_time(case):
    """Twice what the plain loop holds beyond its start: the full batch's graph holds many times as much."""
    return 2 * window_peak(divided, case)


def divided(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()


def not_divided(model, micro_batches):
    """Each micro-batch contributed its whole mean, so the gradient is k times too large; divide each loss by k, the
    number of micro-batches.
    """
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()


def divided_by_samples(model, micro_batches):
    """The mean over a micro-batch is divided by its number of samples once more; the mean has done that already, and
    what is left to divide by is the number of micro-batches.
    """
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / len(targets)).backward()


def divided_by_all_samples(model, micro_batches):
    """Each mean is divided by all the samples of the window, which is right for a sum; a mean needs only the number of
    micro-batches.
    """
    total = sum(len(targets) for _, targets in micro_batches)
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / total).backward()


def sum_divided_by_steps(model, micro_batches):
    """The summed loss is divided by the number of micro-batches; a sum needs the number of all samples."""
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets, reduction="sum") / len(micro_batches)).backward()


def divided_by_four(model, micro_batches):
    """The divisor is always 4; it has to be the number of micro-batches in this window."""
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / 4).backward()


def cleared_inside(model, micro_batches):
    """Only the last micro-batch is left: either the gradients are cleared inside the loop, which belongs before or
    after it, or backward comes after the loop, where it belongs inside.
    """
    for inputs, targets in micro_batches:
        model.zero_grad()
        (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()


def last_alone(model, micro_batches):
    for inputs, targets in micro_batches:
        loss = cross_entropy(model(inputs), targets) / len(micro_batches)
    loss.backward()


last_alone.__doc__ = cleared_inside.__doc__


def divided_again_and_again(model, micro_batches):
    """The collected gradient is divided after each backward, so the first micro-batches are divided many times."""
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
        for parameter in model.parameters():
            parameter.grad /= len(micro_batches)


def stepped(model, micro_batches):
    """The weights were changed; this function only fills .grad, and the step is for the caller."""
    divided(model, micro_batches)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad


def one_backward(model, micro_batches):
    """The gradient is right, but all the graphs are kept until one backward at the end, so the memory is that of the
    large batch; call backward for each micro-batch.
    """
    losses = [cross_entropy(model(inputs), targets) for inputs, targets in micro_batches]
    (sum(losses) / len(losses)).backward()


def joined_again(model, micro_batches):
    """The gradient is right, but the micro-batches are joined into the one large batch that did not fit."""
    inputs, targets = joined(micro_batches)
    cross_entropy(model(inputs), targets).backward()


joined_again.__doc__ = one_backward.__doc__  # by their memory alone the two cannot be told apart

WINDOW = Question(
    "3.1",
    "One normalized window",
    (
        Property(
            "equal micro-batches give the gradient of the one large batch",
            3,
            equal_windows,
            window_gradient,
            full_gradient,
            tried="micro-batches of {sizes} samples",
        ),
        Property(
            "one micro-batch's activations are held at a time",
            1,
            lambda draw: [{"sizes": [64] * 8, "seed": draw.randrange(10**6)}],
            window_peak,
            one_at_a_time,
            tried="micro-batches of {sizes} samples",
            judge=at_most_bytes,
            after="equal micro-batches give the gradient of the one large batch",
            by_value=False,
        ),
    ),
    (
        not_divided,
        divided_by_samples,
        divided_by_all_samples,
        sum_divided_by_steps,
        divided_by_four,
        cleared_inside,
        last_alone,
        divided_again_and_again,
        stepped,
        one_backward,
        joined_again,
    ),
)

# --------------------------------------------------------------------- 3.2: sum or mean


def divisors(answer, case):
    found = answer(case["reduction"], case["sizes"])
    return float(found) if hasattr(found, "__float__") else found if found is None else f"{found!r:.80}"


def right_divisor(case):
    return float(len(case["sizes"]) if case["reduction"] == "mean" else sum(case["sizes"]))


def windows_for(reduction):
    def cases(draw):
        shapes = [(4, 8), (3, 5), (1, 6), (draw.randrange(5, 9), draw.randrange(10, 20))]
        return [{"reduction": reduction, "sizes": [size] * k} for k, size in shapes]

    return cases


def swapped(reduction, sizes):
    """Sum and mean are the wrong way round: a mean has been divided by its own items already, a sum by nothing."""
    return sum(sizes) if reduction == "mean" else len(sizes)


def always_steps(reduction, sizes):
    """The number of micro-batches serves a mean; a sum has been divided by nothing yet, and needs all the items."""
    return len(sizes)


def always_items(reduction, sizes):
    """The number of all items serves a sum; a mean has been divided by its own items already."""
    return sum(sizes)


def first_size(reduction, sizes):
    """A sum is divided by the items of one micro-batch; that makes it a mean, and k means are still added up."""
    return len(sizes) if reduction == "mean" else sizes[0]


def nothing_for_sum(reduction, sizes):
    """A sum is not divided at all; the gradient of the mean over the window needs all its items as the divisor."""
    return len(sizes) if reduction == "mean" else 1


def nothing_for_mean(reduction, sizes):
    """A mean is not divided at all; k of them are added up, so each needs the divisor k."""
    return 1 if reduction == "mean" else sum(sizes)


REDUCTION = Question(
    "3.2",
    "Sum or mean",
    tuple(
        Property(
            f'the divisor for reduction="{reduction}"',
            1,
            windows_for(reduction),
            divisors,
            right_divisor,
            tried="reduction {reduction}, sizes {sizes}",
        )
        for reduction in ("mean", "sum")
    ),
    (swapped, always_steps, always_items, first_size, nothing_for_sum, nothing_for_mean),
)

# --------------------------------------------------------------------- 3.3: a test that notices


def update_with(fill):
    """Make a training step from what fills .grad."""

    def step(model, optimizer, micro_batches):
        optimizer.zero_grad()
        fill(model, micro_batches)
        optimizer.step()
        optimizer.zero_grad()

    return step


def summed(model, micro_batches):
    total = sum(len(targets) for _, targets in micro_batches)
    for inputs, targets in reversed(micro_batches):
        (cross_entropy(model(inputs), targets, reduction="sum") / total).backward()


def scaled_afterwards(model, micro_batches):
    not_divided(model, micro_batches)
    for parameter in model.parameters():
        parameter.grad /= len(micro_batches)


def divided_twice(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / len(micro_batches) ** 2).backward()


def one_left_out(model, micro_batches):
    for inputs, targets in micro_batches[:-1] or micro_batches:
        (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()


def last_undivided(model, micro_batches):
    not_divided(model, micro_batches[-1:])


RIGHT_STEPS = {
    "divides each mean by k": divided,
    "divides each sum by all samples, last micro-batch first": summed,
    "divides the gradient at the end": scaled_afterwards,
    "joins the micro-batches": joined_again,
}
WRONG_STEPS = {
    "clears inside the window": cleared_inside,
    "divides by k twice": divided_twice,
    "leaves the last micro-batch out": one_left_out,
    "divides each mean by its samples": divided_by_samples,
    "divides each sum by k": sum_divided_by_steps,
    "uses the last micro-batch alone": last_undivided,
}


def verdicts_on(steps):
    def probe(answer, case):
        return {name: bool(answer(update_with(fill))) for name, fill in steps.items()}

    return probe


def always(verdict, steps):
    return lambda case: dict.fromkeys(steps, verdict)


def no_verdict_wrong(got, expected):
    wrong = [name for name in expected if got[name] != expected[name]]
    if not wrong:
        return None
    said = {True: "right", False: "wrong"}
    verdict = next(iter(expected.values()))
    return Difference(f"{said[verdict]}, for every step", f"{said[not verdict]}, for a step that {wrong[0]}")


def checks_with(make_optimizer, sizes=(4, 4, 4), compare=None, lr=0.5, same=False):
    """Make a test like the reference one, with one thing changed."""

    def is_right(step):
        torch.manual_seed(1)
        model = nn.Linear(3, 3)
        twin = copy.deepcopy(model)
        micro_batches = [(torch.randn(size, 3), torch.randint(3, (size,))) for size in sizes]
        if same:
            micro_batches = micro_batches[:1] * len(sizes)
        step(model, make_optimizer(model.parameters(), lr=lr), micro_batches)
        inputs, targets = joined(micro_batches)
        cross_entropy(twin(inputs), targets).backward()
        make_optimizer(twin.parameters(), lr=lr).step()
        return (compare or torch.allclose)(model.weight, twin.weight)

    return is_right


def within(atol):
    return lambda one, other: torch.allclose(one, other, atol=atol)


def with_adam(step):
    """The test trains with Adam, which a missing division does not show under; use SGD without clipping, or compare
    the gradients.
    """
    return checks_with(torch.optim.Adam, lr=1e-3)(step)


def with_one_micro_batch(step):
    """The test uses a window of one micro-batch, where nothing needs to be divided; use several."""
    return checks_with(torch.optim.SGD, sizes=(4,))(step)


def to_the_last_bit(step):
    """The test asks for equality to the last bit, which right steps miss by rounding; allow a small tolerance."""
    return checks_with(torch.optim.SGD, compare=torch.equal)(step)


def too_tolerant(step):
    return checks_with(torch.optim.SGD, compare=within(1.0))(step)


def rather_tolerant(step):
    """A step that does not divide is noticed, but other wrong steps pass; compare the new weights closely with those
    that the one large batch gives.
    """
    return checks_with(torch.optim.SGD, compare=within(0.1))(step)


def with_equal_numbers(step):
    """A step that divides by a wrong number passes, because that number happens to be right in your window; give each
    micro-batch several samples, but not as many as there are micro-batches.
    """
    return checks_with(torch.optim.SGD, sizes=(3, 3, 3))(step)


def with_one_sample_each(step):
    return checks_with(torch.optim.SGD, sizes=(1, 1, 1))(step)


with_one_sample_each.__doc__ = with_equal_numbers.__doc__


def with_one_repeated(step):
    """The test repeats one micro-batch, so a step that uses only one of them passes; draw each of them anew."""
    return checks_with(torch.optim.SGD, same=True)(step)


def on_unequal_sizes(step):
    """The test uses micro-batches of unequal sizes; the steps promise the large batch's gradient for equal ones."""
    return checks_with(torch.optim.SGD, sizes=(5, 1, 2))(step)


def always_right(step):
    """The test accepts every step."""
    return True


too_tolerant.__doc__ = always_right.__doc__ = (
    "The test accepts wrong steps too: does it compare at all, with what, and how closely?"
)


def always_wrong(step):
    """The test rejects every step, the right ones too: what does it compare with?"""
    return False


NOTICES = "a step without the division is called wrong"
TEST = Question(
    "3.3",
    "A test that notices",
    (
        Property(
            "every right step is called right",
            2,
            lambda draw: [{}],
            verdicts_on(RIGHT_STEPS),
            always(True, RIGHT_STEPS),
            tried="several right steps",
            judge=no_verdict_wrong,
            after=NOTICES,
        ),
        Property(
            NOTICES,
            2,
            lambda draw: [{}],
            verdicts_on({"does not divide": not_divided}),
            always(False, ["does not divide"]),
            tried="a step that does not divide",
            judge=no_verdict_wrong,
            after="every right step is called right",
        ),
        Property(
            "other wrong steps are called wrong",
            1,
            lambda draw: [{}],
            verdicts_on(WRONG_STEPS),
            always(False, WRONG_STEPS),
            tried="several wrong steps",
            judge=no_verdict_wrong,
            after="every right step is called right",
        ),
    ),
    (
        with_adam,
        with_one_micro_batch,
        to_the_last_bit,
        on_unequal_sizes,
        always_right,
        too_tolerant,
        rather_tolerant,
        with_equal_numbers,
        with_one_sample_each,
        with_one_repeated,
        always_wrong,
    ),
    forbidden=(),
)

QUESTIONS = (WINDOW, REDUCTION, TEST)
