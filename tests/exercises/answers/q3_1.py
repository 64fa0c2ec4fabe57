"""3.1: further right answers, which must get full points, and wrong ones, which must not."""

import itertools
from collections import deque

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def mean_of(model, inputs, targets):
    return cross_entropy(model(inputs), targets)


def scale(model, factor):
    for parameter in model.parameters():
        parameter.grad *= factor


def collects_by_hand(model, micro_batches):
    parameters = list(model.parameters())
    total, k = [torch.zeros_like(parameter) for parameter in parameters], 0
    for inputs, targets in micro_batches:
        k += 1
        loss = nn.CrossEntropyLoss()(model(inputs), targets)
        for held, found in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            held += found
    for parameter, held in zip(parameters, total, strict=True):
        parameter.grad = held / k


def sums_and_divides_by_the_samples(model, micro_batches):
    model.zero_grad()
    count = 0
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets, reduction="sum").backward()
        count += len(targets)
    for parameter in model.parameters():
        parameter.grad = parameter.grad / count


def mean_so_far(model, micro_batches):
    for before, (inputs, targets) in enumerate(micro_batches):
        if before:
            scale(model, before / (before + 1))
        (mean_of(model, inputs, targets) / (before + 1)).backward()


def reads_one_ahead(model, micro_batches):
    micro_batches, k, following = iter(micro_batches), 0, None
    current = next(micro_batches)
    while current is not None:
        following = next(micro_batches, None)
        k += 1
        mean_of(model, *current).backward()
        current = following
    scale(model, 1 / k)


def reads_to_the_end_by_hand(model, micro_batches):
    stream, k = iter(micro_batches), 0
    while True:
        try:
            inputs, targets = next(stream)
        except StopIteration:
            break
        mean_of(model, inputs, targets).backward()
        k += 1
    torch._foreach_div_([parameter.grad for parameter in model.parameters()], k)


def float32_factor(model, micro_batches):
    losses = []
    for inputs, targets in micro_batches:
        losses.append(mean_of(model, inputs, targets))
        losses[-1].backward()
    scale(model, torch.tensor(1.0, dtype=torch.float32) / len(losses))


def keeps_the_last_two(model, micro_batches):
    last, k = deque(maxlen=2), 0
    for each in micro_batches:
        last.append(each)
        mean_of(model, *each).backward()
        k += 1
    scale(model, 1 / k)


def weights_a_running_mean_by_autograd(model, micro_batches):
    parameters = list(model.parameters())
    for number, (inputs, targets) in enumerate(micro_batches, start=1):
        found = torch.autograd.grad(mean_of(model, inputs, targets), parameters)
        for parameter, each in zip(parameters, found, strict=True):
            parameter.grad = each if parameter.grad is None else parameter.grad.lerp(each, 1 / number)


def asks_for_its_length(model, micro_batches):
    for inputs, targets in micro_batches:
        mean_of(model, inputs, targets).backward()
    scale(model, 1 / len(micro_batches))


def lesson_with_a_list(model, micro_batches):
    micro_batches = list(micro_batches)
    for inputs, targets in micro_batches:
        (mean_of(model, inputs, targets) / len(micro_batches)).backward()


def tees_the_stream(model, micro_batches):
    first, second = itertools.tee(micro_batches)
    k = sum(1 for _ in first)
    for inputs, targets in second:
        (mean_of(model, inputs, targets) / k).backward()


def remembers_the_inputs(model, micro_batches):
    seen = []
    for inputs, targets in micro_batches:
        mean_of(model, inputs, targets).backward()
        seen.append(inputs)
    scale(model, 1 / len(seen))


def counts_by_a_list_first(model, micro_batches):
    k = len(list(micro_batches))
    for inputs, targets in micro_batches:
        (mean_of(model, inputs, targets) / k).backward()


def counts_by_a_list_last(model, micro_batches):
    for inputs, targets in micro_batches:
        mean_of(model, inputs, targets).backward()
    scale(model, 1 / len(list(micro_batches)))


def counts_once_more_and_divides(model, micro_batches):
    for inputs, targets in micro_batches:
        mean_of(model, inputs, targets).backward()
    k = sum(1 for _ in micro_batches)
    for parameter in model.parameters():
        parameter.grad = parameter.grad / k


def takes_the_first_to_look_at(model, micro_batches):
    inputs, targets = next(iter(micro_batches))
    k = 0
    for inputs, targets in micro_batches:
        mean_of(model, inputs, targets).backward()
        k += 1
    scale(model, 1 / max(k, 1))


def takes_the_first_by_next(model, micro_batches):
    current, k = next(micro_batches, None), 0
    while current:
        mean_of(model, *current).backward()
        current = next(micro_batches, None)
        k += 1
    scale(model, 1 / k)


def joins_two_at_a_time(model, micro_batches):
    micro_batches, k = iter(micro_batches), 0
    while pair := list(itertools.islice(micro_batches, 2)):
        mean_of(model, *map(torch.cat, zip(*pair, strict=True))).backward()
        k += 1
    scale(model, 1 / k)


def first_by_number(model, micro_batches):
    k = 0
    while True:
        try:
            inputs, targets = micro_batches[k]
        except IndexError:
            break
        mean_of(model, inputs, targets).backward()
        k += 1
    scale(model, 1 / k)


def joins_all(model, micro_batches):
    inputs, targets = (torch.cat(part) for part in zip(*micro_batches, strict=True))
    mean_of(model, inputs, targets).backward()


def keeps_all_graphs(model, micro_batches):
    kept = []
    for inputs, targets in micro_batches:
        kept.append(mean_of(model, inputs, targets))
        kept[-1].backward(retain_graph=True)
    scale(model, 1 / len(kept))


def keeps_the_logits(model, micro_batches):
    kept = []
    for inputs, targets in micro_batches:
        logits = model(inputs)
        kept.append(logits.detach())
        cross_entropy(logits, targets).backward()
    scale(model, 1 / len(kept))


def lists_them_and_their_losses(model, micro_batches):
    window = list(micro_batches)
    losses = [mean_of(model, *each) for each in window]
    for loss in losses:
        (loss / len(window)).backward()


def mean_of_a_stack(model, micro_batches):
    torch.stack([mean_of(model, *each) for each in micro_batches]).mean().backward()


def undivided_in_one_backward(model, micro_batches):
    sum(mean_of(model, inputs, targets) for inputs, targets in micro_batches).backward()


def divides_the_loss_too_late(model, micro_batches):
    k = 0
    for inputs, targets in micro_batches:
        k += 1
        loss = mean_of(model, inputs, targets)
        loss.backward()
    loss /= k


def forgets_to_keep_the_quotient(model, micro_batches):
    k = 0
    for inputs, targets in micro_batches:
        k += 1
        mean_of(model, inputs, targets).backward()
    for parameter in model.parameters():
        parameter.grad / k


def divides_another_copy(model, micro_batches):
    k = 0
    for inputs, targets in micro_batches:
        k += 1
        mean_of(model, inputs, targets).backward()
    for gradient in [parameter.grad for parameter in model.parameters()]:
        gradient = gradient / k


def divides_the_weights(model, micro_batches):
    k = 0
    for inputs, targets in micro_batches:
        k += 1
        mean_of(model, inputs, targets).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter /= k


def enumerates_from_zero(model, micro_batches):
    for i, (inputs, targets) in enumerate(micro_batches):
        mean_of(model, inputs, targets).backward()
        k = i
    for parameter in model.parameters():
        parameter.grad /= k


def enumerates_from_zero_with_a_factor(model, micro_batches):
    for i, (inputs, targets) in enumerate(micro_batches):
        mean_of(model, inputs, targets).backward()
        k = i
    scale(model, 1 / k)


def counts_from_one_and_on(model, micro_batches):
    k = 1
    for inputs, targets in micro_batches:
        mean_of(model, inputs, targets).backward()
        k += 1
    scale(model, 1 / k)


def divides_in_the_loop(model, micro_batches):
    for k, (inputs, targets) in enumerate(micro_batches, start=1):
        mean_of(model, inputs, targets).backward()
        scale(model, 1 / k)


def rescales_after_the_new_one(model, micro_batches):
    for before, (inputs, targets) in enumerate(micro_batches):
        (mean_of(model, inputs, targets) / (before + 1)).backward()
        if before:
            scale(model, before / (before + 1))


def stops_before_the_last(model, micro_batches):
    k, before = 0, None
    for each in micro_batches:
        if before is not None:
            mean_of(model, *before).backward()
        before = each
        k += 1
    if k > 1:
        scale(model, 1 / k)


def keeps_the_last_loss(model, micro_batches):
    for k, (inputs, targets) in enumerate(micro_batches, start=1):
        loss = mean_of(model, inputs, targets) / k
    loss.backward()


def with_retain_graph(divisor):
    def fill(model, micro_batches):
        total = 0.0
        for number, (inputs, targets) in enumerate(micro_batches, start=1):
            total += mean_of(model, inputs, targets)
            (total / divisor(number)).backward(retain_graph=True)

    return fill


def total_without_retaining(model, micro_batches):
    total = 0
    for inputs, targets in micro_batches:
        total += mean_of(model, inputs, targets)
        total.backward()


def smooths_the_labels(model, micro_batches):
    k = 0
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets, label_smoothing=0.1).backward()
        k += 1
    scale(model, 1 / k)


def leaves_its_hooks(model, micro_batches):
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient / 2)
    collects_with_backward(model, micro_batches)


def collects_with_backward(model, micro_batches):
    k = 0
    for inputs, targets in micro_batches:
        mean_of(model, inputs, targets).backward()
        k += 1
    scale(model, 1 / k)


def spoils_its_data(model, micro_batches):
    k = 0
    for inputs, targets in micro_batches:
        mean_of(model, inputs, targets).backward()
        inputs.zero_()
        k += 1
    scale(model, 1 / k)


def does_nothing(model, micro_batches):
    pass


def leaves_eval_on(model, micro_batches):
    model.eval()
    collects_with_backward(model, micro_batches)


def switches_gradients_off(model, micro_batches):
    collects_with_backward(model, micro_batches)
    torch.set_grad_enabled(False)


def clips(model, micro_batches):
    collects_with_backward(model, micro_batches)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def clips_at_each(model, micro_batches):
    k = 0
    for inputs, targets in micro_batches:
        mean_of(model, inputs, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        k += 1
    scale(model, 1 / k)


def divides_by_two_at_least(model, micro_batches):
    k = 0
    for inputs, targets in micro_batches:
        mean_of(model, inputs, targets).backward()
        k += 1
    scale(model, 1 / max(2, k))


def divides_by_k_twice(model, micro_batches):
    collects_with_backward(model, CountedStream(micro_batches, counted := []))
    scale(model, 1 / len(counted))


class CountedStream:
    def __init__(self, stream, counted):
        self.stream, self.counted = stream, counted

    def __iter__(self):
        for each in self.stream:
            self.counted.append(1)
            yield each


def first_parameter_not_divided(model, micro_batches):
    collects_with_backward(model, CountedStream(micro_batches, counted := []))
    next(model.parameters()).grad *= len(counted)


def pops_the_list(model, micro_batches):
    k = 0
    while isinstance(micro_batches, list) and micro_batches:
        mean_of(model, *micro_batches.pop()).backward()
        k += 1
    if k:
        scale(model, 1 / k)
    else:
        collects_with_backward(model, micro_batches)


def steps_too(model, micro_batches):
    collects_with_backward(model, micro_batches)
    torch.optim.SGD(model.parameters(), lr=0.01).step()


RIGHT = [
    collects_by_hand,
    collects_with_backward,
    sums_and_divides_by_the_samples,
    mean_so_far,
    reads_one_ahead,
    reads_to_the_end_by_hand,
    float32_factor,
    keeps_the_last_two,
    weights_a_running_mean_by_autograd,
]
WRONG = [
    does_nothing,
    leaves_its_hooks,
    spoils_its_data,
    leaves_eval_on,
    switches_gradients_off,
    clips,
    divides_by_two_at_least,
    pops_the_list,
    lambda model, micro_batches: mean_so_far(model, itertools.islice(micro_batches, 5)),
]
NAMED = [
    (asks_for_its_length, "len_asked"),
    (lesson_with_a_list, "listed"),
    (tees_the_stream, "listed"),
    (remembers_the_inputs, "listed"),
    (counts_by_a_list_first, "read_twice", "listed"),
    (counts_by_a_list_last, "read_twice"),
    (counts_once_more_and_divides, "read_twice"),
    (takes_the_first_to_look_at,),
    (first_by_number, "indexed"),
    (joins_all, "one_backward"),
    (keeps_all_graphs, "one_backward"),
    (lists_them_and_their_losses, "one_backward"),
    (mean_of_a_stack, "one_backward"),
    (keeps_the_logits, "outputs_kept"),
    (undivided_in_one_backward, "not_divided", "one_backward"),
    (divides_the_loss_too_late, "not_divided"),
    (forgets_to_keep_the_quotient, "not_divided"),
    (divides_another_copy, "not_divided"),
    (divides_the_weights, "weights_divided"),
    (takes_the_first_by_next, "next_of_a_list"),
    (joins_two_at_a_time,),
    (enumerates_from_zero, "counted_one_too_few"),
    (enumerates_from_zero_with_a_factor, "counted_one_too_few"),
    (counts_from_one_and_on, "counted_one_too_many"),
    (divides_in_the_loop, "divided_again_and_again"),
    (rescales_after_the_new_one,),
    (stops_before_the_last,),
    (keeps_the_last_loss, "cleared_inside"),
    (with_retain_graph(lambda number: 1), "running_total_undivided"),
    (total_without_retaining, "freed_graph"),
    (divides_by_k_twice,),
]
WEIGHED = [
    (undivided_in_one_backward, "s 1 each and should have 1/2 each", "the gradient is 2 times too large"),
    (with_retain_graph(lambda number: number), "s 1.5, 0.5 and should have 0.5 each", ""),
    (
        counts_from_one_and_on,
        "s 1/3 each and should have 1/2 each",
        "each mean were divided by 3, where 2 micro-batches",
    ),
    (divides_by_k_twice, "s 1/4 each and should have 1/2 each", "each mean were divided by 4, where 2 micro-batches"),
    (joins_two_at_a_time, "s 1/6, 1/6, 1/6, 1/6, 1/3 and should have 1/5 each", ""),
    (takes_the_first_to_look_at, "s 0, 1 and should have 1/2 each", ""),
    (stops_before_the_last, "s 1/2, 0 and should have 1/2 each", ""),
    (rescales_after_the_new_one, "s 1/2, 1/4 and should have 1/2 each", "Each micro-batch lost a different share: are"),
    (divides_in_the_loop, "s 0.00833, 0.00833, 0.0167, 0.05, 0.2 and should have 0.2 each", ""),
    (clips_at_each, "s 0.00392, 0.0472 and should have 0.5 each", ""),
    (smooths_the_labels, "", "of this gradient is not a weighted sum"),
    (first_parameter_not_divided, "", "of this gradient is not a weighted sum"),
    (spoils_its_data, "", "In a second call: "),
    (does_nothing, "", ""),
    (steps_too, "", ""),
]
