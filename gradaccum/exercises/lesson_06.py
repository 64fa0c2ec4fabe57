"""Lesson 6, GPU memory: the questions, their oracles and their known mistakes."""

from bisect import bisect_right
from functools import cache

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from gradaccum.data import random_tokens
from gradaccum.exercises.material import at_most, at_most_bytes, joined, measure_memory, token_model, weights
from gradaccum.exercises.question import Property, Question


def plain_number(value):
    """Make a number of any kind plain, an int if it is whole; leave what is none, such as a text, to be shown."""
    if not hasattr(value, "__float__"):
        return value
    number = float(value)
    return int(number) if number.is_integer() else number


def backward_of(model, window):
    for inputs, targets in window:
        targets = targets.flatten()
        (cross_entropy(model(inputs).flatten(0, 1), targets) / len(window)).backward()


def update(model, optimizer, window):
    """One update as in lesson 6."""
    backward_of(model, window)
    optimizer.step()
    optimizer.zero_grad()


def after_one_update(optimizer, rows, length, width, vocabulary, accumulation_steps):
    """Make the lesson's model in float32, its optimizer and a window, and run the first update."""
    model = token_model(0, vocabulary, width).float()
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, **options)
    shape = {"batch_size": rows // accumulation_steps, "length": length, "vocabulary": vocabulary}
    known = model, made, list(random_tokens(accumulation_steps, **shape))
    update(*known)
    return known


@cache
def measured_peak(*case):
    known = after_one_update(*case)
    with measure_memory(*known) as memory:
        update(*known)
    return memory.peak_bytes


# --------------------------------------------------------------------- 6.1: the peak as a formula


def shape_of(case):
    return [case[name] for name in ("rows", "length", "width", "vocabulary", "accumulation_steps")]


def peak_by_formula(answer, case):
    return plain_number(answer(*shape_of(case)))


def real_peak(case):
    return measured_peak("SGD", *shape_of(case))


def windows_of(*rows_and_steps):
    """Draw shapes whose worst moment is the loss's backward: more tokens than the width, a larger vocabulary still."""

    def cases(draw):
        return [
            {
                "rows": rows,
                "length": draw.randrange(8, 13),
                "width": draw.randrange(3, 7),
                "vocabulary": draw.randrange(20, 40),
                "accumulation_steps": steps,
            }
            for rows, steps in rows_and_steps
        ]

    return cases


def parts(rows, length, width, vocabulary, accumulation_steps):
    tokens, held = rows * length, 4 * (2 * vocabulary * width + vocabulary)
    at_once = tokens // accumulation_steps
    return {
        "weights": held,
        "state": held,
        "gradients": held * (accumulation_steps > 1),
        "inputs": 16 * tokens,
        "embedding": 4 * at_once * width,
        "logits": 12 * at_once * vocabulary,
        "loss": 8,
    }


def total(shape, **changed):
    return sum((parts(*shape) | changed).values())


def no_copy(*shape):
    """The collected gradients are missing: with more than one micro-batch, one copy stays while the next one runs."""
    return total(shape, gradients=0)


def copy_at_one_too(*shape):
    """A copy of the gradients is counted for a single micro-batch too; there nothing has been collected before."""
    return total(shape, gradients=parts(*shape)["weights"])


def copy_for_each(*shape):
    """Each micro-batch has a copy of the gradients of its own; they are all added up in one."""
    return total(shape, gradients=shape[4] * parts(*shape)["gradients"])


def large_batch(*shape):
    """The activations are those of all tokens of the update; what runs at a time is one micro-batch."""
    whole = parts(*shape[:4], 1)
    return total(shape, embedding=whole["embedding"], logits=whole["logits"])


def inputs_of_one(*shape):
    """The inputs are those of one micro-batch; the whole window's are there all the time."""
    return total(shape, inputs=parts(*shape)["inputs"] // shape[4])


def targets_forgotten(*shape):
    """The inputs have half of their bytes; inputs and targets are both there, and a token id has 8 bytes."""
    return total(shape, inputs=parts(*shape)["inputs"] // 2)


def logits_once(*shape):
    """Too few tensors of tokens times vocabulary; the loss's backward holds three of them at its worst moment."""
    return total(shape, logits=parts(*shape)["logits"] // 3)


def logits_twice(*shape):
    return total(shape, logits=parts(*shape)["logits"] // 3 * 2)


logits_twice.__doc__ = logits_once.__doc__


def no_state(*shape):
    """The optimizer's state is missing: momentum keeps one number for each weight."""
    return total(shape, state=0)


def no_bias(*shape):
    """The linear layer's bias is missing, one number for each token of the vocabulary, wherever weights are counted."""
    held = parts(*shape)["weights"] - 4 * shape[3]
    return total(shape, weights=held, state=held, gradients=held * (shape[4] > 1))


def no_loss(*shape):
    """The last 8 bytes are missing: the loss, and one number that it keeps."""
    return total(shape, loss=0)


def rows_for_tokens(*shape):
    """The rows are taken for the tokens; each row has as many tokens as it is long."""
    rows, _, *others = shape
    return total((rows, 1, *others))


SHAPE = "rows {rows}, length {length}, width {width}, vocabulary {vocabulary}, accumulation steps {accumulation_steps}"
PEAK = Question(
    "6.1",
    "The peak, to the byte",
    tuple(
        Property(name, points, windows_of(*rows_and_steps), peak_by_formula, real_peak, tried=SHAPE)
        for name, points, rows_and_steps in (
            ("the measured peak of a single micro-batch", 1, [(1, 1), (5, 1), (9, 1)]),
            ("the measured peak of several micro-batches", 2, [(12, 2), (15, 3), (4, 4), (21, 7)]),
        )
    ),
    (
        no_copy,
        copy_at_one_too,
        copy_for_each,
        large_batch,
        inputs_of_one,
        targets_forgotten,
        logits_once,
        logits_twice,
        no_state,
        no_bias,
        no_loss,
        rows_for_tokens,
    ),
)

# --------------------------------------------------------------------- 6.2: the largest micro-batch


def peak_of_case(case):
    """Make peak_of: in proportion to the samples, rounded up to whole steps, and flat up to the least."""
    peak, samples = case["peak"], case["effective_batch"]
    least, step = peak.get("flat up to", 0), peak.get("in steps of", 1)

    def peak_of(micro_batch):
        if micro_batch not in range(1, samples + 1):
            raise ValueError(f"peak_of takes an int from 1 to {samples:,}, and was called with {micro_batch}.")
        return peak["base"] + peak["for each sample"] * max(least, -(-int(micro_batch) // step) * step)

    return peak_of


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


def summary(sizes):
    return {"samples in all": sum(sizes), "largest micro-batch": max(sizes), "sizes": sizes} if sizes else []


def planned(answer, case):
    sizes = answer(peak_of_case(case), case["effective_batch"], case["budget"])
    if sizes is None:
        return None
    plain = [plain_number(size) for size in sizes] if hasattr(sizes, "__iter__") else ["none"]
    if not all(isinstance(size, int | float) for size in plain):
        raise TypeError(f"A plan is a list of ints, one for each micro-batch, and this returned {sizes!r:.80}.")
    return summary(plain)


def one_by_one(case):
    samples, peak_of = case["effective_batch"], peak_of_case(case)
    fitting = [size for size in range(1, samples + 1) if peak_of(size) <= case["budget"]]
    sizes = []
    while fitting and sum(sizes) < samples:
        sizes.append(min(fitting[-1], samples - sum(sizes)))
    return summary(sizes)


def calls(answer, case):
    peak_of, asked = peak_of_case(case), []

    def counted(micro_batch):
        asked.append(micro_batch)
        return peak_of(micro_batch)

    answer(counted, case["effective_batch"], case["budget"])
    return len(asked)


def largest(peak_of, most, budget):
    return bisect_right(range(1, most + 1), budget, key=peak_of)


def cut(effective_batch, size):
    whole, rest = divmod(effective_batch, size) if size else (0, 0)
    return [size] * whole + [rest] * (rest > 0)


def right_plan(peak_of, effective_batch, budget):
    return cut(effective_batch, largest(peak_of, effective_batch, budget))


def sample_by_sample(peak_of, effective_batch, budget):
    """The plan is right, but every micro-batch is tried in turn; halve the range that is left instead."""
    return cut(effective_batch, sum(peak_of(size) <= budget for size in range(1, effective_batch + 1)))


def rounded_down(peak_of, effective_batch, budget):
    """The samples that are left over are dropped, so the effective batch shrinks; they make a shorter last one."""
    size = largest(peak_of, effective_batch, budget)
    return [size] * (effective_batch // size) if size else []


def last_too_large(peak_of, effective_batch, budget):
    """The last micro-batch is a whole one, so the effective batch grows; it holds only the samples that are left."""
    size = largest(peak_of, effective_batch, budget)
    return [size] * -(-effective_batch // size) if size else []


def rest_on_top(peak_of, effective_batch, budget):
    """The samples that are left are put on top of the last micro-batch, which then is over the budget."""
    sizes = right_plan(peak_of, effective_batch, budget)
    return [*sizes[:-2], sizes[-2] + sizes[-1]] if len(sizes) > 1 and sizes[-1] < sizes[0] else sizes


def divisors_only(peak_of, effective_batch, budget):
    """Only divisors of the effective batch are tried; a larger micro-batch fits, with a shorter one at the end."""
    size = largest(peak_of, effective_batch, budget)
    return cut(effective_batch, max((n for n in range(1, size + 1) if effective_batch % n == 0), default=0))


def powers_of_two(peak_of, effective_batch, budget):
    """Only powers of two are tried; the largest micro-batch may be any whole number."""
    size = largest(peak_of, effective_batch, budget)
    return cut(effective_batch, 1 << size.bit_length() - 1 if size else 0)


def below_budget(peak_of, effective_batch, budget):
    """A peak that is the budget exactly is refused; it fits."""
    return right_plan(peak_of, effective_batch, budget - 1)


def one_too_many(peak_of, effective_batch, budget):
    """The micro-batch is the first that does not fit; one sample less is the last that does."""
    size = largest(peak_of, effective_batch, budget)
    return cut(effective_batch, min(size + 1, effective_batch) if size else 0)


def never_whole(peak_of, effective_batch, budget):
    """The whole effective batch as one micro-batch is never tried."""
    return cut(effective_batch, largest(peak_of, effective_batch - 1, budget))


def straight_line(peak_of, effective_batch, budget):
    """The peak is taken for a straight line through two of its points; it may have flat parts and steps."""
    each = (peak_of(effective_batch) - peak_of(1)) / max(effective_batch - 1, 1) or 1
    fits = int(1 + (budget - peak_of(1)) // each)
    return cut(effective_batch, min(max(fits, 0), effective_batch))


def evenly(peak_of, effective_batch, budget):
    """The samples are spread evenly; asked for are micro-batches of the largest size, and one shorter at the end."""
    steps = len(right_plan(peak_of, effective_batch, budget))
    return [effective_batch // steps + (step < effective_batch % steps) for step in range(steps)]


def single_anyway(peak_of, effective_batch, budget):
    """Micro-batches of one sample are planned where not even one sample fits; there the plan is an empty list."""
    return cut(effective_batch, max(1, largest(peak_of, effective_batch, budget)))


SITUATION = "effective batch {effective_batch}, budget {budget}, and a peak with {peak}"


def plans(name, points, *rows, after=""):
    return Property(name, points, planning(*rows), planned, one_by_one, SITUATION, after=after)


EQUAL = "where it divides the effective batch, the largest micro-batch alone"
PLAN = Question(
    "6.2",
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
            at_most("calls"),
            after=EQUAL,
            by_value=False,
        ),
    ),
    (
        sample_by_sample,
        rounded_down,
        last_too_large,
        rest_on_top,
        divisors_only,
        powers_of_two,
        below_budget,
        one_too_many,
        never_whole,
        straight_line,
        evenly,
        single_anyway,
    ),
)

# --------------------------------------------------------------------- 6.3: what accumulation costs


@cache
def measured_parts(optimizer, *shape):
    model, made, window = known = after_one_update(optimizer, *shape, 1)
    with measure_memory(*known) as backward:
        backward_of(model, window)
    with measure_memory(*known) as step:
        made.step()
    return {
        "gradients": sum(4 * parameter.numel() for parameter in model.parameters()),
        "activations": backward.peak_bytes - backward.start_bytes,
        "temporaries": step.peak_bytes - step.start_bytes,
    }


def real_updates(*kinds):
    """Draw a width for each: an optimizer, the rows, the smallest and the largest width, and the micro-batches."""

    def cases(draw):
        found = []
        for optimizer, rows, narrow, wide, steps in kinds:
            of = [optimizer, rows, 5, draw.randrange(narrow, wide + 1), 20]
            found.append({"update": of, **measured_parts(*of), "accumulation_steps": steps})
        return found

    return cases


NAMES = "gradients", "activations", "temporaries", "accumulation_steps"


def cost(answer, case):
    return plain_number(answer(*(case[name] for name in NAMES)))


def measured_cost(case):
    """Measure one update of k micro-batches and one of a single one; the further micro-batches' inputs are left out."""
    optimizer, rows, length, *model = case["update"]
    k = case["accumulation_steps"]
    many, one = (measured_peak(optimizer, rows * steps, length, *model, steps) for steps in (k, 1))
    return many - one - 16 * rows * length * (k - 1)


def larger_moment(gradients, activations, temporaries, kept):
    return max(activations + kept, gradients + temporaries)


def always_a_copy(gradients, activations, temporaries, accumulation_steps):
    """A whole copy is counted even where the optimizer's step is the worst moment; the gradients are there anyway."""
    return gradients if accumulation_steps > 1 else 0


def at_one_too(gradients, activations, temporaries, accumulation_steps):
    """A single micro-batch is charged too; it is what the cost is counted from, so it costs nothing."""
    held = gradients, activations, temporaries
    return larger_moment(*held, kept=gradients) - larger_moment(*held, kept=0)


def for_each_step(gradients, activations, temporaries, accumulation_steps):
    """A copy is counted for each further micro-batch; they are all added up in one."""
    return (accumulation_steps - 1) * gradients


def all_or_nothing(gradients, activations, temporaries, accumulation_steps):
    """The cost is a whole copy or nothing; it may be less than a copy, where the worst moment changes."""
    copy = activations >= gradients + temporaries and accumulation_steps > 1
    return gradients if copy else 0


def step_without_gradients(gradients, activations, temporaries, accumulation_steps):
    """The optimizer's step is counted without the gradients that it reads; they are there with one micro-batch too."""
    kept = gradients if accumulation_steps > 1 else 0
    return max(activations + kept, temporaries) - max(activations, temporaries)


def whole_peak(gradients, activations, temporaries, accumulation_steps):
    """This is what is held at the worst moment; asked for is how much more that is than with one micro-batch."""
    return larger_moment(gradients, activations, temporaries, gradients if accumulation_steps > 1 else 0)


def costs(name, *kinds):
    tried = ", ".join(f"{each.replace('_', ' ')} {{{each}}}" for each in NAMES)
    return Property(name, 1, real_updates(*kinds), cost, measured_cost, tried)


COST = Question(
    "6.3",
    "What accumulation costs",
    (
        costs(
            "what is measured, where the backward pass is the worst moment",
            *(("SGD", 4, 6, 30, 2), ("AdamW", 4, 4, 11, 5), ("AdamW", 4, 4, 11, 1), ("SGD", 3, 6, 30, 1)),
        ),
        costs(
            "what is measured, where the optimizer's step is the worst moment",
            *(("AdamW", 4, 17, 40, 2), ("AdamW", 1, 8, 40, 3), ("AdamW", 4, 17, 40, 6), ("AdamW", 1, 8, 40, 1)),
        ),
    ),
    (always_a_copy, at_one_too, for_each_step, all_or_nothing, step_without_gradients, whole_peak),
)

# --------------------------------------------------------------------- 6.4: graphs that stay alive


def train_step(model, optimizer, window):
    """Make one update; return the mean loss and the share of targets guessed."""
    kept = []
    for inputs, targets in window:
        logits, targets = model(inputs).flatten(0, 1), targets.flatten()
        loss = cross_entropy(logits, targets) / len(window)
        loss.backward(retain_graph=True)
        kept.append((loss, logits.detach(), targets))
    optimizer.step()
    optimizer.zero_grad()
    mean_loss = sum(loss.item() for loss, _, _ in kept)
    guessed = sum((logits.argmax(1) == targets).sum() for _, logits, targets in kept)
    return mean_loss, guessed.item() / sum(len(targets) for _, _, targets in kept)


def trained(case):
    """Make a model of many layers and few classes, or the lesson's, and windows of k micro-batches of `rows` rows."""
    model = token_model(case["seed"], case["vocabulary"], width=8)
    for _ in range(case["layers"]):
        model.insert(1, nn.Sequential(nn.Linear(8, 8), nn.Tanh()).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    shape = {"length": 5, "vocabulary": case["vocabulary"], "seed": case["seed"]}
    return model, optimizer, list(random_tokens(case["k"], case["rows"], **shape))


def two_updates(answer, case):
    model, optimizer, window = trained(case)
    returned = [answer(model, optimizer, each) for each in (window, window[::-1])]
    pairs = [list(map(plain_number, each)) if hasattr(each, "__iter__") else [] for each in returned]
    if any(len(pair) != 2 for pair in pairs):
        raise TypeError(f"Return two numbers, the mean loss and the share; this returned {returned[0]!r:.80}.")
    return weights(model), {"losses": [loss for loss, _ in pairs], "shares": [share for _, share in pairs]}


def large_update(model, optimizer, window):
    inputs, targets = joined(window)
    logits, targets = model(inputs).flatten(0, 1), targets.flatten()
    loss = cross_entropy(logits, targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss, (logits.argmax(1) == targets).double().mean()


def peak_beyond_start(answer, case):
    known = trained(case)
    with measure_memory(*known) as memory:
        answer(*known)
    return memory.peak_bytes - memory.start_bytes


@cache
def two_large_updates(*case):
    return two_updates(large_update, dict(case))


@cache
def twice_the_plain_loop(*case):
    return 2 * peak_beyond_start(repaired, dict(case))


def windows_for(vocabulary, layers, *sizes):
    return lambda draw: [
        {"k": k, "rows": rows, "vocabulary": vocabulary, "layers": layers, "seed": draw.randrange(10**6)}
        for k, rows in sizes
    ]


def only_logits_dropped(model, optimizer, window):
    """Graphs are kept, by retain_graph=True or a later backward; a plain backward for each micro-batch frees them."""
    losses, guessed, count = [], 0, 0
    for inputs, targets in window:
        logits, targets = model(inputs).flatten(0, 1), targets.flatten()
        losses.append(cross_entropy(logits, targets) / len(window))
        losses[-1].backward(retain_graph=True)
        guessed, count = guessed + (logits.argmax(1) == targets).sum().item(), count + len(targets)
    optimizer.step()
    optimizer.zero_grad()
    return sum(losses).item(), guessed / count


def one_backward(model, optimizer, window):
    def forward(inputs, targets):
        logits, targets = model(inputs).flatten(0, 1), targets.flatten()
        guesses = logits.argmax(1) == targets
        return cross_entropy(logits, targets) / len(window), guesses.sum().item() / len(targets) / len(window)

    losses, shares = zip(*(forward(*batch) for batch in window), strict=True)
    sum(losses).backward()
    optimizer.step()
    optimizer.zero_grad()
    return sum(losses).item(), sum(shares)


one_backward.__doc__ = only_logits_dropped.__doc__


def repaired(model, optimizer, window, read=lambda logits: logits.argmax(1), divide=True, late=False, last=False):
    """Make the update without a kept graph, with one thing changed."""
    losses, read_logits = [], []
    for inputs, targets in window:
        logits, targets = model(inputs).flatten(0, 1), targets.flatten()
        loss = cross_entropy(logits, targets) / (len(window) if divide else 1)
        loss.backward()
        losses.append(loss.item())
        read_logits.append((read(logits.detach()), targets))
    optimizer.step()
    optimizer.zero_grad()
    if late:
        read_logits = [(model(inputs).flatten(0, 1).argmax(1), targets.flatten()) for inputs, targets in window]
    guesses = [(each if each.ndim == 1 else each.argmax(1)) == targets for each, targets in read_logits]
    return losses[-1] * len(window) if last else sum(losses), torch.cat(guesses).double().mean().item()


def logits_kept(model, optimizer, window):
    """The logits of every micro-batch are kept, in full; count the right guesses in the loop."""
    return repaired(model, optimizer, window, read=lambda logits: logits)


def not_divided(model, optimizer, window):
    """Each micro-batch contributes its whole mean; the loss has to be divided as it was."""
    return repaired(model, optimizer, window, divide=False)


def guessed_late(model, optimizer, window):
    """The guesses are made after the step, by other weights; count them in the loop."""
    return repaired(model, optimizer, window, late=True)


def last_loss(model, optimizer, window):
    """The loss is the last micro-batch's; it has to be the mean over the window, as it was."""
    return repaired(model, optimizer, window, last=True)


TRIED = "{k} micro-batches of {rows} rows, {vocabulary} classes, {layers} layers between"


def still(name, which):
    def probe(answer, case):
        return two_updates(answer, case)[which]

    def oracle(case):
        return two_large_updates(*case.items())[which]

    return Property(name, 0, windows_for(7, 0, (3, 2), (1, 4), (4, 1)), probe, oracle, f"two updates of {TRIED}")


def small(name, vocabulary, layers):
    def oracle(case):
        return twice_the_plain_loop(*case.items())

    cases, judge = windows_for(vocabulary, layers, (12, 5)), at_most_bytes
    return Property(name, 2, cases, peak_beyond_start, oracle, TRIED, judge, by_value=False)


LEAK = Question(
    "6.4",
    "What the loop keeps",
    (
        still("the weights change as by the large batch", 0),
        still("the mean loss and the share are the large batch's", 1),
        small("with many layers: no graph outlives its micro-batch", 3, 4),
        small("with many classes: no logits outlive their micro-batch", 90, 0),
    ),
    (only_logits_dropped, one_backward, logits_kept, not_divided, guessed_late, last_loss),
    given=train_step,
)

QUESTIONS = (PEAK, PLAN, COST, LEAK)
