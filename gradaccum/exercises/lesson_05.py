"""Lesson 5, unequal micro-batches: the questions, their oracles and their known mistakes."""

import copy
from functools import wraps

import torch
from torch.nn.functional import cross_entropy

from gradaccum import data
from gradaccum.exercises.material import at_most_bytes, measure_memory, plain_number, token_model, weights
from gradaccum.exercises.question import Difference, Property, Question

# --------------------------------------------------------------------- 5.1: weights for means


def answered_weights(answer, case):
    found = answer(list(case["counts"]))
    return list(map(plain_number, found)) if hasattr(found, "__iter__") else plain_number(found)


def shares(case):
    """Count for each micro-batch which of all the targets are its own."""
    owners = [index for index, count in enumerate(case["counts"]) for _ in range(count)]
    return [owners.count(index) / len(owners) for index in range(len(case["counts"]))]


def unequal_counts(draw):
    drawn = [draw.randrange(1, 10), draw.randrange(20, 90), draw.randrange(10, 20)]
    return [{"counts": counts} for counts in ([11, 214, 39, 58], [1, 64], [7], drawn)]


def counts_with_zeros(draw):
    return [{"counts": counts} for counts in ([3, 0, 5], [0, draw.randrange(2, 9)], [0, 1, 0, 6])]


def equal_weights(counts):
    """Weights of 1/k make the mean of means; a weight is a micro-batch's share of all targets."""
    return [1 / len(counts) for _ in counts]


def times_k(counts):
    """The weights are k times too large: they add up to k, and those of a mean add up to 1."""
    return [len(counts) * count / sum(counts) for count in counts]


def counts_alone(counts):
    """A mean times its count is the sum of its losses; divide by the count of all targets as well."""
    return counts


def one_over_all(counts):
    """One over N is right for summed losses; a mean was divided by its own count, which has to be undone."""
    return [1 / sum(counts) for _ in counts]


def inverse(counts):
    """The share is upside down: it is the micro-batch's count over the count of all."""
    return [sum(counts) / count for count in counts]


def by_the_largest(counts):
    """The counts are divided by the largest of them; divide by their sum, so that the weights add up to 1."""
    return [count / max(counts) for count in counts]


def zeros_left_out(counts):
    """A micro-batch with a count of 0 has no weight in the list; it needs one too, and that is 0."""
    return [count / sum(counts) for count in counts if count]


def zero_as_one(counts):
    """A count of 0 is taken for 1; a micro-batch without a target has no part in the mean."""
    return [max(count, 1) / sum(max(each, 1) for each in counts) for count in counts]


UNEQUAL = "the weights turn the means of unequal micro-batches into the mean over all targets"
ZEROS = "a micro-batch without a target has the weight 0, and the others are right beside it"
WEIGHTS = Question(
    "5.1",
    "Weights for means",
    (
        Property(UNEQUAL, 2, unequal_counts, answered_weights, shares, tried="counts {counts}"),
        Property(ZEROS, 1, counts_with_zeros, answered_weights, shares, tried="counts {counts}"),
    ),
    (equal_weights, times_k, counts_alone, one_over_all, inverse, by_the_largest, zeros_left_out, zero_as_one),
)

# --------------------------------------------------------------------- 5.2: the token-weighted step


def text(counts, seed, vocabulary=7):
    """Draw padded text: each micro-batch has rows with these numbers of targets; in between all is ignored."""
    draw, window = torch.Generator().manual_seed(seed), []
    for rows in counts:
        inputs = torch.zeros(len(rows), max(rows) + 2, dtype=torch.int64)
        targets = torch.full_like(inputs, data.IGNORED)
        for row, count in enumerate(rows):
            inputs[row, : count + 1] = torch.randint(1, vocabulary, (count + 1,), generator=draw)
            targets[row, 1 : count + 1] = torch.randint(vocabulary, (count,), generator=draw)
            if count:
                targets[row, count] = 0  # a line's end, as in the lesson
        order = torch.randperm(inputs.shape[1], generator=draw)  # ignored may be any place
        window.append((inputs[:, order], targets[:, order]))
    return window


def mean_over_targets(model, window):
    """Pick the targets that are not ignored, and take the mean of all their losses."""
    losses = []
    for inputs, targets in window:
        kept = targets != data.IGNORED
        losses.append(cross_entropy(model(inputs)[kept], targets[kept], reduction="none"))
    return torch.cat(losses).mean()


def last_step(answer, case):
    """Step through the window before, if there is one, then through this one: the same list, if they are equal."""
    model, updates = token_model(case["seed"]), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)  # no learning rate makes up for a divisor
    optimizer.register_step_post_hook(lambda *_: updates.append(1))
    windows = {str(counts): text(counts, case["seed"]) for counts in (case["before"], case["counts"])}
    for counts in filter(None, (case["before"], case["counts"])):
        updates.clear()
        start = weights(model)
        loss = answer(model, optimizer, windows[str(counts)])
    found = {"updates": len(updates), "change of the weights": moved(model, start), "loss": plain_number(loss)}
    # As a word, a nan is equal to another one, so that a mistake can be recognized by it.
    return {name: "not a number" if "nan" in str(found[name]) else found[name] for name in case["compared"]}


def moved(model, start):
    return [after - before for after, before in zip(weights(model), start, strict=True)]


def full_batch_step(case):
    model = token_model(case["seed"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    for counts in filter(None, (case["before"], case["counts"])):
        start = weights(model)
        optimizer.zero_grad()
        loss = mean_over_targets(model, text(counts, case["seed"]))
        loss.backward()
        optimizer.step()
    found = {"updates": 1, "change of the weights": moved(model, start), "loss": loss.item()}
    return {name: found[name] for name in case["compared"]}


def peak(answer, case):
    """Measure what a step holds at most, in bytes beyond the start."""
    vocabulary = 40  # so that activations are much more than the text itself
    model, window = token_model(case["seed"], vocabulary), text(case["counts"], case["seed"], vocabulary)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with measure_memory(model, window) as memory:
        answer(model, optimizer, window)
    return memory.peak_bytes - memory.start_bytes


def plain_peak(case):
    """Allow twice what the plain loop holds beyond its start: the whole window's graphs hold several times as much."""
    return 2 * peak(update_with(filled_with(by_count)), case)


def windows_of(*shapes, before=(), compared=("updates", "change of the weights")):
    rest = {"before": list(before), "compared": list(compared)}
    return lambda draw: [{"counts": counts, "seed": draw.randrange(10**6), **rest} for counts in shapes]


def unequal(draw):
    drawn = [[draw.randrange(1, 6) for _ in range(rows)] for rows in (2, 1, 3)]
    return windows_of([[6, 4], [1], [2, 3, 1]], [[1], [9]], [[3, 1]], [*drawn, [12]])(draw)


def filled_with(losses):
    """Make of a generator of losses what fills .grad: a backward for each of them; it returns their sum."""

    @wraps(losses)
    def fill(model, micro_batches):
        total = 0.0
        for loss in losses(model, micro_batches):
            loss.backward()
            total += loss.item()
        return total

    return fill


def update_with(fill):
    """Make a training step from what fills .grad."""

    @wraps(fill)
    def step(model, optimizer, micro_batches):
        optimizer.zero_grad()
        mean = fill(model, micro_batches)
        optimizer.step()
        optimizer.zero_grad()
        return mean

    return step


def loss_of(model, inputs, targets, reduction="sum"):
    return cross_entropy(model(inputs).flatten(0, -2), targets.flatten(), reduction=reduction)


def count_of(*micro_batches):
    return sum((targets != data.IGNORED).sum().item() for _, targets in micro_batches)


def by_count(model, micro_batches):
    count = count_of(*micro_batches)
    for each in micro_batches:
        yield loss_of(model, *each) / count


def mean_of_means(model, micro_batches):
    """This is the mean of means: a micro-batch with one target counts for as much as one with many; count the window's
    targets first, then divide each summed loss by that count.
    """
    for each in micro_batches:
        yield loss_of(model, *each, "mean") / len(micro_batches)


def weighted_means(model, micro_batches):
    """The mean over no target is nan, and a weight of 0 does not change that; a sum over no target is 0: take sums."""
    for each in micro_batches:
        yield loss_of(model, *each, "mean") * count_of(each) / count_of(*micro_batches)


def rows_counted(model, micro_batches):
    """Each mean is weighted by its number of rows, but rows have unequal numbers of targets; count targets."""
    for each in micro_batches:
        yield loss_of(model, *each, "mean") * len(each[1]) / sum(len(targets) for _, targets in micro_batches)


def padding_counted(model, micro_batches):
    """The divisor counts the ignored targets too; count those that are not -100."""
    for each in micro_batches:
        yield loss_of(model, *each) / sum(targets.numel() for _, targets in micro_batches)


def ignored_overwritten(model, micro_batches):
    """Ignored targets are overwritten, and in the next epoch they count; leave the window's tensors as they are."""
    yield from by_count(model, micro_batches)
    for _, targets in micro_batches:
        targets.clamp_(min=0)


def inputs_counted(model, micro_batches):
    """The divisor counts inputs; count the targets that are not -100, which is another number."""
    for each in micro_batches:
        yield loss_of(model, *each) / sum((inputs != 0).sum() for inputs, _ in micro_batches)


def not_divided(model, micro_batches):
    """The summed losses are not divided at all; divide each by the count of the window's targets."""
    for each in micro_batches:
        yield loss_of(model, *each)


def count_so_far(model, micro_batches):
    """The divisor is the count so far, too small but for the last; count the window before the first backward."""
    for index, each in enumerate(micro_batches, start=1):
        yield loss_of(model, *each) / max(count_of(*micro_batches[:index]), 1)


def cleared_inside(model, micro_batches):
    """The gradients are cleared inside the loop, so only the last micro-batch is left; clear once per window."""
    for loss in by_count(model, micro_batches):
        model.zero_grad()
        yield loss


def one_backward(model, micro_batches):
    """The gradient is right, but the whole window's graphs are alive at once, and the memory is nearly that of the full
    batch; call backward for each micro-batch, before the next one runs.
    """
    yield sum(list(by_count(model, micro_batches)))


def made_one(model, micro_batches):
    inputs, targets = (torch.cat([each.flatten() for each in part]) for part in zip(*micro_batches, strict=True))
    yield cross_entropy(model(inputs), targets)


made_one.__doc__ = one_backward.__doc__  # by their memory alone the two cannot be told apart


def not_cleared(model, optimizer, micro_batches):
    """The gradients of one window are still there in the next; clear them once per window."""
    mean = filled_with(by_count)(model, micro_batches)
    optimizer.step()
    return mean


def not_stepped(model, optimizer, micro_batches):
    """The gradients were collected, but the weights did not move: call optimizer.step() at the end of the window."""
    return filled_with(by_count)(model, micro_batches)


def stepped_inside(model, optimizer, micro_batches):
    """The weights move at every micro-batch, and the next one sees another model; step once, after the window."""
    count = count_of(*micro_batches)
    fill = filled_with(lambda model, part: (loss_of(model, *each) / count for each in part))
    return sum(update_with(fill)(model, optimizer, [each]) for each in micro_batches)


def summed_loss(model, micro_batches):
    """The gradient is right, but what is returned is the sum of the losses; divide that by the count, too."""
    return filled_with(by_count)(model, micro_batches) * count_of(*micro_batches)


def last_loss(model, micro_batches):
    """The gradient is right, but what is returned is the last micro-batch's part of the loss; add up all parts."""
    filled_with(by_count)(model, micro_batches)
    return loss_of(model, *micro_batches[-1]) / count_of(*micro_batches)


FULL = "the update is that of the mean loss over all targets of the window"
EMPTY = "a micro-batch without any target changes nothing"
LOSS = "the mean loss over all targets is returned"
AGAIN = "the next window starts afresh, and the same one does in the next epoch"
HELD = "one micro-batch's activations are held at a time"
TOKENS = "targets in the rows of each micro-batch: {counts}, and the rest ignored"
TWICE = "a window with {before} targets, then one with {counts}, the same list if these are equal"
MANY, ALIKE = "8 micro-batches of 4 rows with 20 targets each", windows_of([[20] * 4] * 8)
empty_ones = windows_of([[3, 1], [0, 0], [2]], [[0], [4]], [[5, 1], [2], [0]])


def seconds(draw):
    others = windows_of([[2], [2]], [[1, 3], [2, 2]], before=[[3], [3]])
    return others(draw) + windows_of([[3, 1], [2]], before=[[3, 1], [2]])(draw)


losses = windows_of([[4, 2], [1]], [[3, 1], [0, 0], [2]], compared=["loss"])
WRONG_MEANS = mean_of_means, weighted_means, rows_counted, not_divided, count_so_far
WRONG_REST = padding_counted, inputs_counted, cleared_inside, one_backward, made_one, ignored_overwritten
STEP = Question(
    "5.2",
    "The token-weighted step",
    (
        Property(FULL, 2, unequal, last_step, full_batch_step, TOKENS),
        Property(EMPTY, 1, empty_ones, last_step, full_batch_step, TOKENS),
        Property(LOSS, 1, losses, last_step, full_batch_step, TOKENS),
        Property(AGAIN, 1, seconds, last_step, full_batch_step, TWICE),
        Property(HELD, 1, ALIKE, peak, plain_peak, MANY, judge=at_most_bytes, after=FULL, by_value=False),
    ),
    (
        *(update_with(filled_with(each)) for each in WRONG_MEANS + WRONG_REST),
        *(update_with(summed_loss), update_with(last_loss), not_cleared, not_stepped, stepped_inside),
    ),
)

# --------------------------------------------------------------------- 5.3: the fix that lost the point


def window_gradient(model, micro_batches):
    """Leave in .grad the gradient of the mean loss over all targets; return the loss."""
    loss_sum, count = 0.0, 0
    for inputs, targets in micro_batches:
        logits = model(inputs)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss_sum = loss_sum + loss
        count = count + (targets != data.IGNORED).sum()
    mean = loss_sum / count
    mean.backward()
    return mean.item()


def as_step(probe):
    return lambda answer, case: probe(update_with(answer), case)


def running_sum(model, micro_batches, **options):
    """The running sum holds the earlier micro-batches' graphs too; call backward on this micro-batch's own loss."""
    mean = 0.0
    for loss in by_count(model, micro_batches):
        mean = mean + loss
        mean.backward(**options)
    return mean


def graphs_retained(model, micro_batches):
    """With retain_graph=True the graphs of the running sum stay, and the first micro-batches are added many times; call
    backward on this micro-batch's own loss.
    """
    return running_sum(model, micro_batches, retain_graph=True)


KEPT = "the gradient is that of the mean loss over all targets of the window"
REPAIR = Question(
    "5.3",
    "The fix that lost the point",
    (
        Property(KEPT, 0, unequal, as_step(last_step), full_batch_step, TOKENS),
        Property(LOSS, 0, losses, as_step(last_step), full_batch_step, TOKENS),
        Property(AGAIN, 0, seconds, as_step(last_step), full_batch_step, TWICE),
        Property(HELD, 3, ALIKE, as_step(peak), plain_peak, MANY, judge=at_most_bytes, after=KEPT, by_value=False),
    ),
    (
        *map(filled_with, (one_backward, made_one, mean_of_means, not_divided, count_so_far, ignored_overwritten)),
        *(running_sum, graphs_retained, summed_loss, last_loss),
    ),
    given=window_gradient,
)

# --------------------------------------------------------------------- 5.4: a test that notices


def float32_shares(model, micro_batches):
    total = torch.tensor(count_of(*micro_batches), dtype=torch.float32)
    for each in [each for each in micro_batches if count_of(each)]:
        yield loss_of(model, *each, "mean") * (count_of(each) / total)


def scaled_afterwards(model, micro_batches):
    yield from not_divided(model, micro_batches[::-1])
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= count_of(*micro_batches)


def first_not_moved(model, micro_batches):
    yield from by_count(model, micro_batches)
    next(model.parameters()).grad.zero_()


def one_left_out(model, micro_batches):
    yield from list(by_count(model, micro_batches))[:-1]


RIGHT_STEPS = {
    "divides each sum by the count of all targets": by_count,
    "weights each mean by its share of the targets": float32_shares,
    "divides the gradient at the end": scaled_afterwards,
    "calls backward once, at the end": one_backward,
}
WRONG_STEPS = {
    "counts the padding too": padding_counted,
    "does not divide": not_divided,
    "clears inside the window": cleared_inside,
    "leaves the last micro-batch out": one_left_out,
    "moves only some of the weights": first_not_moved,
}


def verdicts(name, points, steps, verdict, after):
    """Ask what a learner's test calls each of some steps."""
    said = ("right", "wrong") if verdict else ("wrong", "right")

    def probe(answer, case):
        return {does: bool(answer(update_with(filled_with(losses)))) for does, losses in steps.items()}

    def expected(case):
        return dict.fromkeys(steps, verdict)

    def judge(got, expected):
        wrong = [does for does in expected if got[does] != verdict]
        return Difference(f"{said[0]}, for every one", f"{said[1]}, for one that {wrong[0]}") if wrong else None

    return Property(name, points, lambda draw: [{}], probe, expected, f"{said[0]} steps", judge, after)


def trial(step, window, optimizer=torch.optim.SGD, lr=0.5, rtol=1e-5, mean=mean_over_targets):
    """Test as the reference does, with one thing changed."""
    model = token_model(1)
    twin = copy.deepcopy(model)
    step(model, optimizer(model.parameters(), lr=lr), window)
    mean(twin, window).backward()
    optimizer(twin.parameters(), lr=lr).step()
    return torch.allclose(torch.tensor(weights(model)), torch.tensor(weights(twin)), rtol, atol=rtol / 100)


def without_ignored(window):
    kept = [targets != data.IGNORED for _, targets in window]
    return [tuple(part[here].view(len(part), -1) for part in each) for each, here in zip(window, kept, strict=True)]


UNLIKE = text([[5, 2], [2]], seed=1)  # 7 of 9 is rounded in float32


def with_equal_counts(step):
    """The micro-batches of the test have equally many targets, and there a mean of means is right; let them differ."""
    return trial(step, without_ignored(text([[3, 3], [3, 3]], seed=1)))


def without_padding(step):
    """No target of the test is ignored, so a step that counts those too is called right; let rows have padding."""
    return trial(step, without_ignored(text([[5, 5], [1]], seed=1)))


def with_adam(step):
    """The test trains with Adam, which shows a mean of means but hides a constant factor; use SGD without clipping."""
    return trial(step, UNLIKE, optimizer=torch.optim.Adam, lr=1e-3)


def to_the_last_bit(step):
    """The test asks for equality to the last bit, which right steps miss by rounding; allow a small tolerance."""
    return trial(step, UNLIKE, rtol=0)


def means_expected(step):
    """The test expects the mean of means itself, and calls right steps wrong; compare with one batch of all rows."""
    return trial(step, UNLIKE, mean=lambda model, window: sum(mean_over_targets(model, [part]) / 2 for part in window))


def always_right(step):
    """The test accepts every step, the wrong ones too: does it compare weights or gradients, and how closely?"""
    return True


def always_wrong(step):
    """The test rejects every step, the right ones too: what does it compare with?"""
    return False


RIGHT, NOTICES = "every right step is called right", "a step that takes the mean of means is called wrong"
TEST = Question(
    "5.4",
    "A test that notices",
    (
        verdicts(RIGHT, 1, RIGHT_STEPS, True, after=NOTICES),
        verdicts(NOTICES, 2, {"takes the mean of means": mean_of_means}, False, after=RIGHT),
        verdicts("other wrong steps are called wrong", 1, WRONG_STEPS, False, after=RIGHT),
    ),
    (
        *(with_equal_counts, without_padding, with_adam, to_the_last_bit, means_expected),
        *(always_right, always_wrong),
    ),
    forbidden=(),
)

QUESTIONS = (WEIGHTS, STEP, REPAIR, TEST)
