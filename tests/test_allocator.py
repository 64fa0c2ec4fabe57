"""The model of CUDA's caching allocator, against traces worked out by hand, its invariants, and a slow reference."""

import itertools
import random

import pytest
import torch

from gradaccum.memory import predict_memory
from gradaccum.memory.allocator import CachingAllocator

KIB, MIB = 2**10, 2**20


class Slow:
    """The same rules on a list of segments, each a list of [size, name or None]: no sorted lists, no links."""

    def __init__(self):
        self.segments = []

    def allocate(self, name, nbytes):
        size = max(512, -(-nbytes // 512) * 512)
        small = size <= MIB
        free = [
            (block[0], segment, place)
            for segment, (is_small, blocks) in enumerate(self.segments)
            for place, block in enumerate(blocks)
            if is_small == small and block[1] is None and block[0] >= size
        ]
        if not free:
            whole = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            self.segments.append((small, [[whole, None]]))
            free = [(whole, len(self.segments) - 1, 0)]
        found, segment, place = min(free)
        blocks, rest = self.segments[segment][1], found - size
        if rest >= 512 if small else rest > MIB:
            blocks[place : place + 1] = [[size, name], [rest, None]]
        else:
            blocks[place][1] = name

    def release(self, name):
        for _, blocks in self.segments:
            for block in blocks:
                if block[1] == name:
                    block[1] = None
            for place in reversed(range(len(blocks) - 1)):
                if blocks[place][1] is None and blocks[place + 1][1] is None:
                    blocks[place : place + 2] = [[blocks[place][0] + blocks[place + 1][0], None]]

    def reserved(self):
        return sum(size for _, blocks in self.segments for size, _ in blocks)


@pytest.mark.parametrize(
    ("trace", "reserved"),
    [
        ([1], 2 * MIB),
        ([MIB, MIB], 2 * MIB),
        ([MIB, MIB, 1], 4 * MIB),
        ([MIB + 1], 20 * MIB),
        ([5 * MIB] * 4, 20 * MIB),
        ([9 * MIB + 512, 9 * MIB + 512], 20 * MIB),
        ([9 * MIB, 10 * MIB], 20 * MIB),  # free space of a shared segment serves a large request too
        ([9 * MIB, 11 * MIB + 1], 32 * MIB),  # else it gets a segment of its own
        ([11 * MIB], 12 * MIB),
        ([19 * MIB, -0, 10 * MIB, 8 * MIB], 20 * MIB),
        ([11 * MIB, -0, 11 * MIB + 1], 12 * MIB),
        ([30 * MIB, -0, 29 * MIB + 1, 2 * MIB], 50 * MIB),  # less than 1 MiB is left over, and not split off
        ([30 * MIB, -0, 20 * MIB, 9 * MIB], 30 * MIB),
        ([7 * MIB, 7 * MIB, 6 * MIB, -1, -0, 14 * MIB], 20 * MIB),  # joined with the block after
        ([7 * MIB, 7 * MIB, 6 * MIB, -0, -1, 14 * MIB], 20 * MIB),  # and with the one before
        ([7 * MIB, 7 * MIB, 6 * MIB, -0, -2, 13 * MIB], 34 * MIB),  # not over one that is in use
    ],
)
def test_traces_by_hand(trace, reserved):
    allocator, blocks, is_release = CachingAllocator(), [], False
    for step in map(Step, trace):
        is_release = step.release is not None
        if is_release:
            allocator.release(blocks[step.release])
        else:
            blocks.append(allocator.allocate(step.size))
    assert allocator.reserved_bytes == reserved


class Step:
    """A size, or a release where a number from 0 down is given: -1 releases the second block."""

    def __init__(self, number):
        self.release, self.size = (-number, None) if number <= 0 else (None, number)


@pytest.mark.parametrize("seed", range(6))
def test_it_does_what_the_slow_one_does(seed):
    draw, fast, slow, held = random.Random(seed), CachingAllocator(), Slow(), {}
    sizes = [1, 512, 513, 40 * KIB, 700 * KIB, MIB, MIB + 1, 3 * MIB, 9 * MIB, 10 * MIB, 11 * MIB, 33 * MIB]
    for number in range(600):
        if held and draw.random() < 0.48:
            name = draw.choice(sorted(held))
            fast.release(held.pop(name))
            slow.release(name)
        else:
            size = draw.choice(sizes) + draw.randrange(0, 3) * 512
            held[number] = fast.allocate(size)
            slow.allocate(number, size)
        assert fast.reserved_bytes == slow.reserved()
        blocks = sorted(fast._sizes)
        assert sum(fast._sizes.values()) == fast.reserved_bytes, "used and free make reserved"
        for one, other in itertools.pairwise(blocks):
            same = fast._segments[one] == fast._segments[other]
            assert not (same and {one, other} <= fast._unused), "two free neighbours"
    for block in held.values():
        fast.release(block)
    assert all(size == fast.reserved_bytes or fast._segments[at] == at for at, size in fast._sizes.items())
    assert len(fast._sizes) == len(fast._pools), "each segment is one free block again"


def test_a_prediction_reserves_what_its_tensors_need():
    def step(x):
        y = x + 1  # 4 MiB
        del y
        return [x + 1, x + 1]

    report = predict_memory(lambda: torch.zeros(MIB), step)
    assert report.reserved_bytes == 20 * MIB
    assert report.first.reserved_bytes == 20 * MIB
    assert predict_memory(lambda: torch.zeros(8 * MIB), step).reserved_bytes == 3 * 32 * MIB
    assert f"reserved {20 * MIB:,}" in repr(report)
    assert predict_memory(lambda: torch.zeros(MIB), step, device="cpu").reserved_bytes is None


def test_a_resized_storage_is_allocated_anew():
    def step(x):
        x.resize_(16 * MIB // 4)
        return x + 1

    assert predict_memory(lambda: torch.zeros(1), step).reserved_bytes == 2 * MIB + 2 * 16 * MIB
