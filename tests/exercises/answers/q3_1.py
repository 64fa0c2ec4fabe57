"""3.1: further right answers, which must get full points, and wrong ones, which must not."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy


def collects_by_hand(model, micro_batches):
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for inputs, targets in micro_batches:
        loss = nn.CrossEntropyLoss()(model(inputs), targets)
        for held, found in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            held += found
    for parameter, held in zip(parameters, total, strict=True):
        parameter.grad = held / len(micro_batches)


def sums_backwards_and_clears_first(model, micro_batches):
    model.zero_grad()
    items = sum(inputs.shape[0] for inputs, _ in micro_batches)
    for inputs, targets in micro_batches[::-1]:
        cross_entropy(model(inputs), targets, reduction="sum").div(items).backward()


def passes_the_gradient_in(model, micro_batches):
    for inputs, targets in micro_batches:
        loss = cross_entropy(model(inputs), targets)
        loss.backward(torch.full_like(loss, 1 / len(micro_batches)))


def divides_at_the_end_in_place(model, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
    for parameter in model.parameters():
        parameter.grad.mul_(1 / len(micro_batches))


def float32_factor(model, micro_batches):
    factor = torch.tensor(1.0, dtype=torch.float32) / len(micro_batches)
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) * factor).backward()


def mean_so_far(model, micro_batches):
    for before, (inputs, targets) in enumerate(micro_batches):
        for parameter in model.parameters():
            if before:
                parameter.grad *= before / (before + 1)
        (cross_entropy(model(inputs), targets) / (before + 1)).backward()


def leaves_its_hooks(model, micro_batches):
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient / len(micro_batches))
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()


def spoils_its_data(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()
        inputs.zero_()


def divides_by_one_more(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / (len(micro_batches) + 1)).backward()


def leaves_the_first_out(model, micro_batches):
    for inputs, targets in micro_batches[1:]:
        (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()


def does_nothing(model, micro_batches):
    pass


def keeps_all_graphs(model, micro_batches):
    kept = []
    for inputs, targets in micro_batches:
        kept.append(cross_entropy(model(inputs), targets) / len(micro_batches))
        kept[-1].backward(retain_graph=True)


def keeps_the_outputs(model, micro_batches):
    kept = []
    for inputs, targets in micro_batches:
        kept.append(model(inputs))
        (cross_entropy(kept[-1], targets) / len(micro_batches)).backward()


def leaves_eval_on(model, micro_batches):
    model.eval()
    sums_backwards_and_clears_first(model, micro_batches)


def switches_gradients_off(model, micro_batches):
    sums_backwards_and_clears_first(model, micro_batches)
    torch.set_grad_enabled(False)


def pops_the_window(model, micro_batches):
    k = len(micro_batches)
    while micro_batches:
        inputs, targets = micro_batches.pop()
        (cross_entropy(model(inputs), targets) / k).backward()


def clips(model, micro_batches):
    sums_backwards_and_clears_first(model, micro_batches)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def divides_by_two_at_least(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / max(2, len(micro_batches))).backward()


def undivided_in_one_backward(model, micro_batches):
    sum(cross_entropy(model(inputs), targets) for inputs, targets in micro_batches).backward()


def with_retain_graph(divisor):
    def fill(model, micro_batches):
        total = 0.0
        for number, (inputs, targets) in enumerate(micro_batches, start=1):
            total += cross_entropy(model(inputs), targets)
            (total / divisor(number)).backward(retain_graph=True)

    return fill


def divides_by_k_twice(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / len(micro_batches) ** 2).backward()


def sums_by_those_so_far(model, micro_batches):
    for number, (inputs, targets) in enumerate(micro_batches, start=1):
        (cross_entropy(model(inputs), targets, reduction="sum") / number).backward()


def halves_what_is_there(model, micro_batches):
    for inputs, targets in micro_batches:
        cross_entropy(model(inputs), targets).backward()
        for parameter in model.parameters():
            parameter.grad /= 2


def smooths_the_labels(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets, label_smoothing=0.1) / len(micro_batches)).backward()


def clips_at_each(model, micro_batches):
    for inputs, targets in micro_batches:
        (cross_entropy(model(inputs), targets) / len(micro_batches)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def steps_too(model, micro_batches):
    sums_backwards_and_clears_first(model, micro_batches)
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def first_parameter_not_divided(model, micro_batches):
    sums_backwards_and_clears_first(model, micro_batches)
    next(model.parameters()).grad *= len(micro_batches)


RIGHT = [
    collects_by_hand,
    sums_backwards_and_clears_first,
    passes_the_gradient_in,
    divides_at_the_end_in_place,
    float32_factor,
    mean_so_far,
]
WRONG = [
    divides_by_one_more,
    leaves_the_first_out,
    does_nothing,
    leaves_its_hooks,
    spoils_its_data,
    leaves_eval_on,
    switches_gradients_off,
    pops_the_window,
    clips,
    divides_by_two_at_least,
    lambda model, micro_batches: mean_so_far(model, micro_batches[:5]),
]
NAMED = [
    (keeps_all_graphs, "one_backward"),
    (keeps_the_outputs, "one_backward"),
    (undivided_in_one_backward, "not_divided", "one_backward"),
    (with_retain_graph(lambda number: 1), "running_total_undivided"),
    (divides_by_one_more,),
]
WEIGHED = [
    (undivided_in_one_backward, "s 1 each and should have 1/2 each", "the gradient is 2 times too large"),
    (with_retain_graph(lambda number: number), "s 1.5, 0.5 and should have 0.5 each", ""),
    (divides_by_one_more, "s 1/3 each and should have 1/2 each", "each mean were divided by 3, where 2 micro-batches"),
    (divides_by_k_twice, "s 1/4 each and should have 1/2 each", "each mean were divided by 4, where 2 micro-batches"),
    (leaves_the_first_out, "s 0, 1/2 and should have 1/2 each", ""),
    (sums_by_those_so_far, "s 3, 1.5 and should have 0.5 each", ""),
    (halves_what_is_there, "s 1/4, 1/2 and should have 1/2 each", ""),
    (clips_at_each, "s 1.65e-06, 0.000993 and should have 0.5 each", ""),  # one micro-batch alone has a common factor
    (smooths_the_labels, "", "of this gradient is no weighted sum"),
    (first_parameter_not_divided, "", "of this gradient is no weighted sum"),
    (spoils_its_data, "", "In a second call: "),
    (does_nothing, "", ""),
    (steps_too, "", ""),
]
