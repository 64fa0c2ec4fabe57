"""What measure_memory reports, against closed forms, the allocator's own events, torch's tracker and a plain list."""

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

from gradaccum.memory import ROLES, Held, measure_memory, predict_memory
from gradaccum.memory.measure import DeviceCounters
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
    assert sum(memory.at_peak.values()) == memory.peak_bytes == memory.followed_bytes
    assert memory.peak_bytes >= max(memory.start_bytes, memory.end_bytes)
    sizes = [one.nbytes for one in memory.largest]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(sizes) == memory.peak_bytes or (len(sizes) == 10 and sum(sizes) < memory.peak_bytes)
    return {role: size for role, size in memory.at_peak.items() if size}


@pytest.mark.parametrize("accumulation_steps", [1, 2, 4])
@pytest.mark.parametrize(("vocabulary", "width", "tokens"), [(100, 16, 512), (50, 40, 512), (1000, 16, 1024)])
def test_the_lessons_peak_is_the_closed_form(vocabulary, width, tokens, accumulation_steps):
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


def test_a_deferred_backward_holds_a_full_batch():
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
    handles, before, peak, end, after = [], [0], 28, 28, [28]
    with measure_memory([known], timeline=True) as memory:
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
            after += [end] if end != after[-1] else []
    assert held(memory)
    assert (memory.start_bytes, memory.peak_bytes, memory.end_bytes) == (28, peak, end)
    sums = timeline(memory)
    assert (sums[0], sums[-1]) == (28, end)
    later = iter(sums)
    assert all(end in later for end in after)  # in this order


def timeline(memory):
    """Check a report's timeline, and return the sums over its roles."""
    assert tuple(memory.timeline) == ROLES
    moments = list(zip(*memory.timeline.values(), strict=True))
    sums = [sum(moment) for moment in moments]
    assert max(sums) == memory.followed_bytes
    assert moments[sums.index(max(sums))] == tuple(memory.at_peak.values())
    return sums


def test_the_largest_are_named_with_their_maker():
    model, inputs = nn.Linear(100, 50, bias=False), torch.ones(8, 100)
    with measure_memory(model, inputs) as memory:
        model(inputs).square().sum().backward()
    assert held(memory)
    assert memory.largest == [
        Held(20_000, "parameters", "given", (50, 100), torch.float32),
        Held(20_000, "gradients", "aten.mm", (50, 100), torch.float32),
        Held(3200, "inputs", "given", (8, 100), torch.float32),
        Held(1600, "backward temporaries", "aten.mul", (8, 50), torch.float32),
        Held(4, "activations", "aten.sum", (), torch.float32),
        Held(4, "activations", "aten.ones_like", (), torch.float32),  # where backward starts from
    ]
    with measure_memory([torch.zeros(size, dtype=torch.int64) for size in [*range(15), 14]]) as memory:
        torch.zeros(1)
    assert [one.shape for one in memory.largest] == [(14,), (14,), *((size,) for size in range(13, 5, -1))]
    assert {one.dtype for one in memory.largest} == {torch.int64}


def test_the_timeline_has_the_final_roles():
    weight, kept = nn.Parameter(torch.ones(10)), torch.ones(1)
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)
    with measure_memory(optimizer, kept, timeline=True) as memory:
        weight.grad = torch.ones(10)
        optimizer.step()
        optimizer.zero_grad()
        kept.resize_(3)  # becomes free, and is made again
    assert timeline(memory) == [44, 84, 124, 84, 80, 92]
    assert {role: bytes_ for role, bytes_ in memory.timeline.items() if any(bytes_)} == {
        "parameters": [40] * 6,
        "gradients": [0, 40, 40, 0, 0, 0],
        "optimizer state": [0, 0, 40, 40, 40, 40],
        "inputs": [4, 4, 4, 4, 0, 12],
    }
    model, optimizer, window = build(lesson, "adamw foreach", 2)
    with measure_memory(model, optimizer, window, timeline=True) as memory:
        update(model, optimizer, window)
    assert held(memory)
    assert len(timeline(memory)) > 40
    with measure_memory() as memory:
        pass
    with pytest.raises(AttributeError, match=r"'timeline': request it with timeline=True"):
        memory.timeline  # noqa: B018


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


def test_a_gradient_set_by_hand_is_a_gradient():
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


def test_what_is_dropped_becomes_free():
    window, model = [torch.zeros(1000) for _ in range(3)], nn.Linear(1000, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with measure_memory(window, model, optimizer) as memory:
        window.clear()
        del model, optimizer
        torch.zeros(4001)  # as much again: of equal peaks the first is reported
    assert (memory.start_bytes, memory.peak_bytes, memory.end_bytes) == (16004, 16004, 0)
    assert held(memory) == {"parameters": 4004, "inputs": 12000}


def test_a_wrapping_tensor_counts_as_its_parts():
    with measure_memory() as memory:
        nested = torch.nested.nested_tensor([torch.zeros(3), torch.zeros(5)], layout=torch.jagged)
        doubled = nested * 2  # shares the offsets
    assert memory.end_bytes == nested.values().nbytes + doubled.values().nbytes + nested.offsets().nbytes


def test_an_error_passes_and_leaves_nothing():
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


def test_the_report_reads_well():
    batch = torch.zeros(300)
    measure = measure_memory(batch)
    with measure as memory:
        batch = torch.zeros(400)
        with pytest.raises(AttributeError, match=r"'peak_bytes'.*when the block has ended"):
            memory.peak_bytes  # noqa: B018
    lines = repr(memory).splitlines()
    assert lines[0] == "Peak memory: 2,800 bytes (start 1,200, end 1,600)"
    assert lines[4:6] == [
        "  inputs                         1,200    42.9%",
        "  activations                    1,600    57.1%",
    ]
    assert len(lines) == 1 + len(ROLES)
    with pytest.raises(RuntimeError, match="create a new one"), measure:
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
        ("cuda" * 1000, TypeError, "'cuda.*, a str: pass modules, optimizers, tensors"),
        (None, TypeError, "None, a NoneType"),
        ([torch.zeros(2), object()], TypeError, "<object object at .* a object"),
        ([torch.zeros(2).as_subclass(Elsewhere)], NotImplementedError, "on the CPU here, not one on cpu: name the"),
        ([torch.eye(2).to_sparse()], NotImplementedError, "sparse_coo on cpu"),
        (torch.compile(nn.Linear(2, 2)), NotImplementedError, "compiled OptimizedModule"),
        (compiled_inside(), NotImplementedError, "pass the module that is not compiled"),
    ],
)
def test_what_cannot_be_followed_is_refused(known, error, said):
    with pytest.raises(error, match=said) as caught:
        measure_memory(nn.Linear(2, 2), known)
    assert len(str(caught.value)) < 250


class Counters:  # stands for torch.accelerator's functions, on a machine that has no accelerator
    def __init__(self):
        self.held, self.peak, self.reserved, self.calls = 0, 0, 0, []

    def use(self, nbytes):
        self.held += nbytes
        self.peak, self.reserved = max(self.peak, self.held), max(self.reserved, 2 * self.held)

    def stand_in(self, kind="cuda"):
        def read(name, value):
            return lambda device: self.calls.append((name, str(device))) or value()

        return {
            "current_accelerator": lambda check_available=False: torch.device(kind),
            "device_count": lambda: 2,
            "current_device_index": lambda: 1,
            "synchronize": read("synchronize", lambda: None),
            "memory_allocated": read("held", lambda: self.held),
            "max_memory_allocated": read("peak", lambda: self.peak),
            "max_memory_reserved": read("reserved", lambda: self.reserved),
            "reset_peak_memory_stats": read("reset", lambda: vars(self).update(peak=self.held, reserved=self.held)),
        }


@pytest.fixture
def counters(monkeypatch):
    counters = Counters()
    for name, function in counters.stand_in().items():
        monkeypatch.setattr(torch.accelerator, name, function)
    return counters


def test_a_device_counts_from_a_reset(counters):
    counters.use(500)
    counters.use(-400)
    measure = measure_memory(compiled_inside(), device="cuda")  # it sees compiled code as it is
    assert "reset" not in dict(counters.calls)
    counters.calls.clear()
    with measure as memory:
        calls = [name for name, device in counters.calls if device == "cuda:1"]
        assert calls == ["synchronize", "reset", "held"]
        counters.calls.clear()
        counters.use(200)
        counters.use(-250)
        assert torch._C._len_torch_dispatch_stack() == 0
    assert [name for name, _ in counters.calls] == ["synchronize", "peak", "reserved", "held"]
    assert (memory.start_bytes, memory.peak_bytes, memory.end_bytes, memory.reserved_bytes) == (100, 300, 50, 600)
    assert repr(memory) == "Peak memory: 300 bytes (start 100, end 50, reserved 600)"
    with pytest.raises(AttributeError, match="'at_peak': request it with roles=True"):
        memory.at_peak  # noqa: B018


def test_on_a_device_blocks_nest(counters):
    with measure_memory(device="cuda:0") as outer:
        counters.use(1000)
        counters.use(-900)
        with pytest.raises(torch.OutOfMemoryError), measure_memory(device="cuda:0") as inner:  # noqa: PT012
            counters.use(300)
            counters.use(-350)
            raise torch.OutOfMemoryError
        counters.use(10)
    assert (inner.start_bytes, inner.peak_bytes, inner.end_bytes, inner.reserved_bytes) == (100, 400, 50, 800)
    assert (outer.start_bytes, outer.peak_bytes, outer.end_bytes, outer.reserved_bytes) == (0, 1000, 60, 2000)
    with measure_memory(device="cuda:0") as later:
        pass
    assert later.peak_bytes == 60
    assert not DeviceCounters._running


@pytest.mark.parametrize(
    ("device", "error", "said"),
    [
        ("gpu", TypeError, 'such as "cpu" or "cuda", but \'gpu\' was given'),
        ("xpu", ValueError, "no xpu here, only cpu, cuda:0, cuda:1: name one of these"),
        ("cuda:2", ValueError, "no cuda:2 here"),
        ("cuda", NotImplementedError, "cuda does not count its memory in torch 2"),
    ],
)
def test_a_device_that_is_of_no_use_is_refused(device, error, said, counters, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: -1)
    with pytest.raises(error, match=said):
        measure_memory(device=device)


def test_without_an_accelerator_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    with pytest.raises(ValueError, match="There is no cuda here, only cpu: name"):
        measure_memory(device="cuda")
    with measure_memory(device="cpu") as memory:
        torch.zeros(2)
    assert (memory.peak_bytes, memory.reserved_bytes) == (8, None)


def on_a_pretended_device():
    """Run in a process of its own: torch keeps a backend for good. Tensors have a device there, but no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils import backend_registration

    backend_registration._setup_privateuseone_for_python_backend("pretended")

    def make(device):
        model = nn.Sequential(nn.Linear(10, 20, device=device), nn.Tanh(), nn.Linear(20, 5, device=device))
        return model, torch.optim.Adam(model.parameters(), foreach=False), torch.ones(8, 10, device=device)

    def step(model, optimizer, batch):
        model(batch.to(model[0].weight.device)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    with FakeTensorMode():
        built = make("pretended")
        with pytest.raises(NotImplementedError, match="pretended does not count its memory"):
            measure_memory(*built)  # in truth, as torch's counters are told of no allocator
        counters = Counters()
        vars(torch.accelerator).update(counters.stand_in("pretended") | {"current_device_index": lambda: 0})
        measured = []
        for _ in range(2):
            with measure_memory(*built, timeline=True) as memory:
                counters.use(70)
                step(*built)
            assert memory.peak_bytes == counters.held
            timeline(memory)
            measured.append(memory)
        *others, _ = built
        with pytest.raises(ValueError, match="are on cpu and pretended:0: name one of them, device='pretended:0'"):
            measure_memory(*others, torch.ones(2))
        with measure_memory(*others, torch.ones(2), device="pretended", roles=True) as both:
            elsewhere = torch.ones(3), torch.ones(3, device="meta")
            elsewhere[0].to("pretended")
        assert both.at_peak["inputs"] == 0
        assert both.at_peak["activations"] == 12
        with pytest.raises(NotImplementedError, match="on pretended:0: name the device"), measure_memory():
            torch.ones(3, device="pretended")
        with pytest.raises(NotImplementedError, match="dense tensors, not one in"):
            measure_memory(torch.ones(2, 2).to_sparse(), device="cpu")
    predicted = predict_memory(partial(make, "cpu"), step, device="cpu")
    return measured, [predicted.first, predicted]


def test_tensors_on_a_device_are_tracked():
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot pretend to have a device")
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        measured, predicted = process.submit(on_a_pretended_device).result()
    for there, here in zip(measured, predicted, strict=True):
        counters = 4 * 4  # Adam's, which stay on the host
        assert there.at_peak == here.at_peak | {"optimizer state": here.at_peak["optimizer state"] - counters}
        assert [one[1:] for one in there.largest][:5] == [one[1:] for one in here.largest][:5]
