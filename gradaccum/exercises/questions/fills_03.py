"""Ways to fill `.grad` from a window that has no length, which go wrong: how, and the sentence of each."""

from types import SimpleNamespace

from torch.nn.functional import cross_entropy

from gradaccum.exercises.questions import lesson_03


def divide(model, divisor):
    for parameter in model.parameters():
        parameter.grad /= divisor


def made(factor=lambda at: 1, end=lambda k: k, before=None, after=None, total=""):
    """Make an answer: what each mean is multiplied by, what divides in the end, what is done before and after each."""

    def fill(model, micro_batches):
        so_far = 0.0
        for number, (inputs, targets) in enumerate(micro_batches, start=1):
            if before:
                before(model)
            loss = factor(SimpleNamespace(number=number, size=len(targets))) * cross_entropy(model(inputs), targets)
            so_far = so_far + loss
            (so_far if total else loss).backward(retain_graph=total == "retained")
            if after:
                after(model, number)
        divide(model, end(number))

    return fill


def undivided(k):
    return 1


def clear(model):
    model.zero_grad()


K = "k, which you know after the last micro-batch"
AGAIN = "The mean over a micro-batch is divided by its number of samples once more; the mean has already done that"
SO_FAR = "Each loss is divided by the number of micro-batches so far, which is k only for the last one"
LAST = (
    "Only the last micro-batch is left: the gradients before it are cleared or overwritten, or backward is called for "
    "it alone; call it for each, and leave .grad alone in between."
)
TOTAL = (
    "backward() starts from a running total, so the first micro-batches are added again with each later one; call it "
    "on this micro-batch's own loss."
)
TOO_FEW = "The divisor is k - 1: if a count starts at 0, as in enumerate, the last number is k - 1."
UNDIVIDED = f"Nothing divides by {K}."
FILLS = [  # name, sentence, how it is made
    (
        "not_divided",
        "Each micro-batch contributed its whole mean, so the gradient is k times too large; divide each .grad by "
        "k after the last micro-batch, in place: `p.grad /= k`.",
        {"end": undivided},
    ),
    (
        "divided_by_samples",
        f"{AGAIN}, so divide only by {K}.",
        {"factor": lambda at: 1 / at.size, "end": undivided},
    ),
    (
        "divided_by_all_samples",
        "The means are divided by all the samples of the window, or by k and by their own samples, which is the same "
        "number; that is right for sums, and means need only k.",
        {"factor": lambda at: 1 / at.size},
    ),
    (
        "sum_divided_by_steps",
        "The summed losses are divided by the number of micro-batches; a sum needs the number of all samples.",
        {"factor": lambda at: at.size},
    ),
    (
        "divided_by_four",
        "The divisor is always 4; it must be the number of micro-batches.",
        {"end": lambda k: 4},
    ),
    (
        "divided_by_those_so_far",
        f"{SO_FAR}; leave that out, and divide each .grad by k at the end.",
        {"factor": lambda at: 1 / at.number, "end": undivided},
    ),
    (
        "divided_by_those_so_far_and_k",
        f"{SO_FAR}; and then all is divided by k once more: leave the first division out.",
        {"factor": lambda at: 1 / at.number},
    ),
    (
        "divided_again_and_again",
        "The collected gradient is divided by the count after each backward, so the first micro-batches are "
        "divided many times; divide once, after the last one.",
        {"after": divide, "end": undivided},
    ),
    ("counted_one_too_few", TOO_FEW, {"end": lambda k: k - 1}),
    ("factor_of_one_too_few", TOO_FEW, {"end": lambda k: 1 / (1 / (k - 1))}),  # an error where k is 1
    (
        "counted_one_too_many",
        "The divisor is k + 1: the count starts at 1 and goes on by 1 with each micro-batch; start it at 0.",
        {"end": lambda k: k + 1},
    ),
    ("cleared_inside", LAST, {"before": clear}),
    ("cleared_inside_undivided", f"{LAST} And one more: {UNDIVIDED}", {"before": clear, "end": undivided}),
    ("running_total", TOTAL, {"total": "retained"}),
    ("running_total_undivided", f"{TOTAL} And one more: {UNDIVIDED}", {"total": "retained", "end": undivided}),
    (
        "freed_graph",
        "A backward() meets a graph that an earlier one has freed: call it once for each micro-batch, on that "
        "micro-batch's own loss and not on a running total, which retain_graph=True would count several times.",
        {"total": "freed"},
    ),
]


def counted(micro_batches):
    return sum(1 for _ in micro_batches)


def counted_first(model, micro_batches):
    k = counted(micro_batches)
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / k).backward()


def counted_before_the_division(model, micro_batches):
    k = counted(micro_batches)
    lesson_03.not_divided(model, micro_batches)
    divide(model, k)  # an error: there is no .grad


def counted_after_the_loop(model, micro_batches):
    lesson_03.not_divided(model, micro_batches)
    divide(model, counted(micro_batches))


def counted_for_a_factor(model, micro_batches):
    lesson_03.not_divided(model, micro_batches)
    return 1 / counted(micro_batches)  # an error


READ_TWICE = counted_first, counted_before_the_division, counted_after_the_loop, counted_for_a_factor
