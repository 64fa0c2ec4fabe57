"""What measure_memory reports, against closed forms, the allocator's own events, torch's tracker and a plain list."""

import copy
import pickle
from functools import partial

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from gradaccum.memory import ROLES, measure_memory
from gradaccum.models import GPT, embedding_linear

lesson = partial(embedding_linear, 100, 32)


def tied_gpt():
    model = GPT(100, context=4, width=32, layers=1)
    model.head.weight = model.token_embedding.weight
    return model


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
}


def build(make_model, optimizer, accumulation_steps=1, tokens=128, vocabulary=100):
    torch.manual_seed(0)
    model, shape = make_model(), (tokens // accumulation_steps // 4, 4)
    window = [[torch.randint(vocabulary, shape) for _ in range(2)] for _ in range(accumulation_steps)]
    return model, OPTIMIZERS[optimizer](model.parameters()), window


def mean_loss(model, x, targets, count):
    return cross_entropy(model(x).flatten(0, 1), targets.flatten(), reduction="sum") / count


def update(model, optimizer, window):
    count = sum(targets.numel() for _, targets in window)
    for micro_batch in window:
        mean_loss(model, *micro_batch, count).backward()
    optimizer.step()
    optimizer.zero_grad()


def measured_update(model, optimizer, window):
    with measure_memory(model, optimizer, window) as memory:
        update(model, optimizer, window)
    assert held(memory)
    return memory


def held(memory):
    """Check that the report is whole, and return the roles that hold something at its peak."""
    assert tuple(memory.at_peak) == ROLES
    assert sum(memory.at_peak.values()) == memory.peak_bytes
    assert memory.peak_bytes >= max(memory.start_bytes, memory.end_bytes)
    return {role: size for role, size in memory.at_peak.items() if size}


@pytest.mark.parametrize("accumulation_steps", [1, 2, 4])
@pytest.mark.parametrize(("vocabulary", "width", "tokens"), [(100, 16, 512), (50, 40, 512), (1000, 16, 1024)])
def test_peak_of_the_lesson_model_is_the_closed_form(vocabulary, width, tokens, accumulation_steps):
    made = build(partial(embedding_linear, vocabulary, width), "sgd", accumulation_steps, tokens, vocabulary)
    model, optimizer, window = made
    parameters, micro = 4 * (2 * vocabulary * width + vocabulary), tokens // accumulation_steps
    alone = {
        "parameters": parameters,
        "inputs": 16 * micro,
        "activations": 4 * micro * width + 4 * micro * vocabulary + 8,
        "backward temporaries": 8 * micro * vocabulary,
    }
    assert held(measured_update(model, optimizer, window[:1])) == alone
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    # Accumulation costs exactly one copy of the gradients over one of its micro-batches.
    more = {"gradients": parameters} if accumulation_steps > 1 else {}
    with measure_memory(model, optimizer, window) as outer:
        memory = measured_update(model, optimizer, window)
    assert held(memory) == held(outer) == alone | more | {"inputs": 16 * tokens}
    assert memory.start_bytes == memory.end_bytes == parameters + 16 * tokens


def test_one_deferred_backward_holds_what_the_full_batch_holds():
    model, optimizer, window = build(lesson, "sgd", 8, tokens=1024)
    full = measured_update(model, optimizer, [[torch.cat(part) for part in zip(*window, strict=True)]])
    accumulated = measured_update(model, optimizer, window)
    with measure_memory(model, window) as deferred:
        sum(mean_loss(model, *micro_batch, 1024) for micro_batch in window).backward()
    graph = full.at_peak["activations"]
    assert 1.01 * graph >= deferred.at_peak["activations"] >= graph > 7 * accumulated.at_peak["activations"]
    assert deferred.peak_bytes > 2.5 * accumulated.peak_bytes


def allocator_bytes(step):
    """Run `step`, and return the peak and the end of the bytes that the allocator itself recorded, from 0."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # Private: the public tables sum these events by operator and lose their order.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, held


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("model", "accumulation_steps", "tokens"),
    [(lesson, 1, 16), (lesson, 4, 256), (tied_gpt, 2, 128)],  # 16: the step is the peak
)
def test_the_allocator_recorded_the_same(model, optimizer, accumulation_steps, tokens):
    real, followed = (build(model, optimizer, accumulation_steps, tokens) for _ in range(2))
    for _ in range(2):  # the first step, which makes the optimizer's state, and a later one
        peak, end = allocator_bytes(lambda: update(*real))
        memory = measured_update(*followed)
        assert abs(memory.peak_bytes - memory.start_bytes - peak) <= 64
        assert abs(memory.end_bytes - memory.start_bytes - end) <= 64
    assert all(map(torch.equal, real[0].parameters(), followed[0].parameters()))  # measuring changes no result


def test_torch_has_a_tracker_that_agrees():
    tracker_module = pytest.importorskip("torch.distributed._tools.mem_tracker", exc_type=ImportError)
    model, optimizer, window = build(tied_gpt, "momentum")
    theirs = tracker_module.MemTracker()
    theirs.track_external(model, optimizer, *window[0])
    with theirs:
        update(model, optimizer, window)
    (snapshot,) = theirs.get_tracker_snapshot("peak").values()
    assert measured_update(*build(tied_gpt, "momentum")).peak_bytes == snapshot["Total"]


ACTIONS = ["make", "known", "foreign", "view", "list", "grow", "free"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 99), st.integers(1, 40)), max_size=40))
def test_peak_is_the_largest_sum_of_live_bytes(program):
    known, foreign = torch.zeros(7), torch.zeros(9)
    # A storage is a list with its size, shared by the handles on it; `before` is what the block adds nothing for.
    handles, before, peak, end = [], [0], 28, 28
    with measure_memory([known]) as memory:
        for action, where, size in program:
            if action == "make":
                handles.append((torch.zeros(size), [4 * size]))
            elif action in ("known", "foreign"):
                handles.append((known[:3] if action == "known" else foreign.view(3, 3), before))
            elif handles:
                tensor, storage = handles[where % len(handles)]
                if action == "view":
                    handles.append((tensor.flatten()[: max(1, tensor.numel() // 2)], storage))
                elif action == "list":
                    handles += [(made, [4 * made.numel()]) for made in torch._foreach_add([tensor] * 2, 1.0)]
                elif action == "grow" and storage is not before:
                    storage[0] += 4 * size
                    tensor.set_(tensor.untyped_storage(), 0, (1,)).resize_(storage[0] // 4)
                elif action == "free":
                    handles.pop(where % len(handles))
                del tensor
            end = 28 + sum({id(storage): storage[0] for _, storage in handles}.values())
            peak = max(peak, end)
    assert held(memory)
    assert (memory.start_bytes, memory.peak_bytes, memory.end_bytes) == (28, peak, end)


def test_the_first_adam_step_shows_every_role():
    model, optimizer, window = build(lesson, "adamw foreach", tokens=8)
    parameters = 4 * (2 * 100 * 32 + 100)
    with measure_memory(model, optimizer, window) as memory:
        logits = model(window[0][0])
        logits.retain_grad()
        cross_entropy(logits.flatten(0, 1), window[0][1].flatten()).backward()
        optimizer.step()
    at_peak = held(memory)
    assert at_peak.pop("activations") >= 4 * 8 * 100  # the logits
    assert at_peak.pop("optimizer temporaries") >= parameters
    kept = {"parameters": parameters, "gradients": parameters, "optimizer state": 2 * parameters + 4 * 3}
    assert at_peak == kept | {"inputs": 16 * 8, "backward temporaries": 4 * 8 * 100}
    with measure_memory(model, optimizer) as after:
        optimizer.zero_grad()
    assert held(after) == kept
    assert after.end_bytes == after.start_bytes - parameters


def test_a_gradient_assigned_by_hand_is_a_gradient():
    weight = nn.Parameter(torch.ones(1000))
    with measure_memory(weight) as memory:
        weight.grad = torch.ones(1000)
    assert held(memory) == {"inputs": 4000, "gradients": 4000}


def gradient_used_and_gone(weight, optimizer):
    weight.grad = torch.ones(1000)
    optimizer.step()
    with torch.no_grad():
        torch.zeros(1000)  # no part of the step before it
    weight.grad = None


def backward_and_gone(weight, optimizer):
    weight.exp().sum().backward()
    weight.grad = None


def step_in_backward(weight, optimizer):
    weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    (weight * 2).sum().backward()


def closure(weight, optimizer):
    optimizer.step(lambda: (weight * 2).exp().sum().backward())


@pytest.mark.parametrize(
    ("program", "more"),
    [
        (gradient_used_and_gone, {"gradients": 4000, "optimizer state": 4000, "activations": 4000}),
        (backward_and_gone, {"gradients": 4000, "activations": 4008}),
        (step_in_backward, {"gradients": 4000, "optimizer state": 4000, "activations": 8}),
        (closure, {"backward temporaries": 4000, "activations": 4008}),
    ],
)
def test_roles_in_a_small_program(program, more):
    weight = nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)
    with measure_memory(optimizer) as memory:
        program(weight, optimizer)
    assert held(memory) == {"parameters": 4000} | more


def test_a_first_step_that_fails():
    weight = nn.Parameter(torch.ones(1000))
    weight.grad = torch.ones(1000)
    optimizer = torch.optim.Adam([weight], foreach=False)
    optimizer.param_groups[0]["lr"] = "no number"  # found out when the state is there
    with measure_memory(optimizer) as memory:
        with pytest.raises(TypeError):
            optimizer.step()
        torch.zeros(1000)
    assert held(memory) == {"parameters": 4000, "gradients": 4000, "optimizer state": 8004, "activations": 4000}


def views_and_shared_parameters():
    shared, batch = nn.Linear(10, 10, bias=False), torch.zeros(4, 10)
    model = nn.Sequential(shared, shared)
    model.register_buffer("scale", torch.zeros(5))
    return model, shared, model[0].weight, torch.optim.SGD(model.parameters(), 0.1), {"x": batch, "y": [batch[0]]}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("make", "at_start"),
    [
        (views_and_shared_parameters, {"parameters": 400 + 20, "inputs": 160}),
        (lambda: torch.zeros(1000)[:10], {"inputs": 4000}),  # the whole storage of a slice
        (lambda: nn.Parameter(torch.zeros(10)) * 2, {"inputs": 40}),  # it has a graph, and no .grad to read
        (lambda: torch.optim.Adam([torch.ones(10)], lr=torch.tensor(0.1)), {"parameters": 40, "optimizer state": 4}),
        (lambda: [{"x": torch.zeros(10), "text": ["a"], "length": 3, "weight": None}], {"inputs": 40}),
        (lambda: torch.zeros(1000, device="meta"), {}),  # a shape without memory
    ],
)
def test_what_is_held_at_the_start(make, at_start):
    known = make()
    with measure_memory(known) as memory:
        torch.zeros(0)
    assert held(memory) == at_start
    assert memory.start_bytes == memory.peak_bytes == memory.end_bytes == sum(at_start.values())
    assert repr(memory)


def test_what_is_made_out_of_sight_counts():
    array, batch = numpy.zeros(1000, dtype=numpy.float32), torch.zeros(100)
    with measure_memory(batch) as memory:
        kept = [torch.from_numpy(array), torch.tensor([1.0] * 10), copy.deepcopy(batch)]
        kept.append(pickle.loads(pickle.dumps(kept[1])))
    assert memory.end_bytes - memory.start_bytes == sum(tensor.nbytes for tensor in kept[1:]) == 40 + 400 + 40


def test_a_storage_that_is_resized_is_followed():
    with measure_memory() as memory:
        x = torch.zeros(10)
        x.resize_(1000)
        x.untyped_storage().resize_(80)
        x = x[:10] + 0  # seen when it is next the result of an operation, a view here
    assert (memory.peak_bytes, memory.end_bytes) == (4000, 40)
    with measure_memory() as memory:
        torch.add(torch.ones(100), 1, out=torch.empty(0))
    assert memory.peak_bytes == 800


def test_what_is_dropped_in_the_block_becomes_free():
    window, model = [torch.zeros(1000) for _ in range(3)], nn.Linear(1000, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with measure_memory(window, model, optimizer) as memory:
        window.clear()
        del model, optimizer
        torch.zeros(4001)  # as much again: of equal peaks the first is reported
    assert (memory.start_bytes, memory.peak_bytes, memory.end_bytes) == (16004, 16004, 0)
    assert held(memory) == {"parameters": 4004, "inputs": 12000}


def test_a_tensor_that_wraps_others_counts_as_they_do():
    with measure_memory() as memory:
        nested = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(5)], layout=torch.jagged)
        doubled = nested * 2  # shares the offsets
    assert memory.end_bytes == nested.values().nbytes + doubled.values().nbytes + nested.offsets().nbytes


def test_an_error_passes_through_and_nothing_stays_behind():
    model, optimizer, window = build(lesson, "adam")
    model[0].sparse = True  # its gradient is refused where it is made
    with pytest.raises(NotImplementedError, match="sparse_coo on cpu"), measure_memory(model, optimizer) as memory:  # noqa: PT012
        assert all(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
        update(model, optimizer, window)
    at_peak = held(memory)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert torch._C._len_torch_dispatch_stack() == 0
    pickle.dumps((model, optimizer))
    model[0].sparse = False
    update(model, optimizer, window)
    assert held(memory) == at_peak


def test_the_report_reads_well_and_says_when_it_is_not_there():
    batch = torch.zeros(300)
    measure = measure_memory(batch)
    with measure as memory:
        batch = torch.zeros(400)
        with pytest.raises(AttributeError, match=r"'peak_bytes'.*once the block has ended"):
            memory.peak_bytes  # noqa: B018
    lines = repr(memory).splitlines()
    assert lines[0] == "Peak memory: 2,800 bytes (start 1,200, end 1,600)"
    assert lines[4:6] == [
        "  inputs                         1,200    42.9%",
        "  activations                    1,600    57.1%",
    ]
    assert len(lines) == 1 + len(ROLES)
    with pytest.raises(RuntimeError, match="make a new one"), measure:
        pass


class Elsewhere(torch.Tensor):  # stands for a tensor on another device, on a machine that has none
    is_cpu = False


def compiled_inside():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].compile()
    return model


@pytest.mark.parametrize(
    ("known", "error", "said"),
    [
        ("cuda" * 1000, TypeError, "'cuda.*, a str: give it modules, optimizers, tensors"),
        (None, TypeError, "None, a NoneType"),
        ([torch.zeros(2), object()], TypeError, "<object object at .* a object"),
        ([torch.zeros(2).as_subclass(Elsewhere)], NotImplementedError, "on the CPU"),
        ([torch.eye(2).to_sparse()], NotImplementedError, "sparse_coo on cpu"),
        (torch.compile(nn.Linear(2, 2)), NotImplementedError, "compiled OptimizedModule"),
        (compiled_inside(), NotImplementedError, "give it the plain module"),
    ],
)
def test_what_cannot_be_followed_is_refused(known, error, said):
    with pytest.raises(error, match=said) as caught:
        measure_memory(nn.Linear(2, 2), known)
    assert len(str(caught.value)) < 250
