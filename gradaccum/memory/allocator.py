"""A model of CUDA's caching allocator: the memory it reserves for a sequence of allocations and releases."""

from __future__ import annotations

import weakref
from bisect import bisect_left, insort
from typing import Final

import torch

# The names are those in c10/core/AllocatorConfig.h.
MIN_BLOCK_SIZE: Final = 512
SMALL_SIZE: Final = 2**20  # up to this size, from a segment of SMALL_BUFFER
SMALL_BUFFER: Final = 2 * 2**20
MIN_LARGE_ALLOC: Final = 10 * 2**20  # below, from a segment of LARGE_BUFFER; otherwise from its own segment
LARGE_BUFFER: Final = 20 * 2**20
ROUND_LARGE: Final = 2 * 2**20


class CachingAllocator:
    """A model of torch's caching allocator on one stream (c10/cuda/CUDACachingAllocator.cpp).

    Sizes are rounded up to 512 bytes. A request takes the smallest free block that is large enough, and the rest is
    split off; otherwise a new segment is reserved. A released block is merged with free neighbours and kept. Segments
    are never released, as on a device that does not run out of memory. Not modelled: several streams, graphs,
    `expandable_segments`, `max_split_size_mb` and the other settings of `PYTORCH_CUDA_ALLOC_CONF`.

    Attributes:
        reserved_bytes: the size of all segments, as `torch.cuda.memory_reserved()` returns it.

    Example:
        >>> allocator = CachingAllocator()
        >>> block = allocator.allocate(1000)
        >>> allocator.reserved_bytes, allocator.size_of(block)
        (2097152, 1024)
    """

    def __init__(self) -> None:
        self.reserved_bytes = 0
        self._sizes: dict[int, int] = {}  # of every block, free or not, by address
        self._segments: dict[int, int] = {}  # the address of each block's segment
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # (size, address); small segments, large
        self._pools: dict[int, bool] = {}  # whether a segment is a small one
        self._before: dict[int, int] = {}  # the block that ends where one begins, in the same segment
        self._unused: set[int] = set()
        self._held: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, int]] = {}

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Allocate for a storage, unless already done; release when the storage is freed."""
        key, nbytes = id(storage), storage.nbytes()
        known = self._held.get(key)
        if known and known[0]() is storage:
            if known[2] == nbytes:
                return
            self.release(known[1])  # it was resized
        block = self.allocate(nbytes)
        self._held[key] = weakref.ref(storage, lambda _: self._drop(key, block)), block, nbytes

    def allocate(self, nbytes: int) -> int:
        """Allocate a block of `nbytes` and return its address."""
        size = max(1, -(-nbytes // MIN_BLOCK_SIZE)) * MIN_BLOCK_SIZE
        is_small = size <= SMALL_SIZE
        free = self._free[is_small]
        place = bisect_left(free, (size, 0))
        address = free.pop(place)[1] if place < len(free) else self._reserve(size, is_small)
        self._unused.discard(address)
        rest = self._sizes[address] - size
        if rest >= MIN_BLOCK_SIZE if is_small else rest > SMALL_SIZE:
            after = address + self._sizes[address]
            self._sizes[address] = size
            self._add(address + size, rest, self._segments[address], address)
            if self._segments.get(after) == self._segments[address]:
                self._before[after] = address + size
            self._release(address + size)
        return address

    def release(self, address: int) -> None:
        """Release a block, and merge it with the free blocks before and after it."""
        segment = self._segments[address]
        after = address + self._sizes[address]
        if self._segments.get(after) == segment and after in self._unused:
            self._join(address, after)
        before = self._before.get(address)
        if before is not None and before in self._unused:
            self._take(before)
            self._join(before, address)
            address = before
        self._release(address)

    def size_of(self, address: int) -> int:
        """Return the size of a block, which may be larger than requested."""
        return self._sizes[address]

    def _reserve(self, size: int, is_small: bool) -> int:
        own = -(-size // ROUND_LARGE) * ROUND_LARGE
        segment = SMALL_BUFFER if is_small else LARGE_BUFFER if size < MIN_LARGE_ALLOC else own
        address = self.reserved_bytes + len(self._pools)  # apart by one byte, so that no two segments touch
        self.reserved_bytes += segment
        self._pools[address] = is_small
        self._add(address, segment, address, None)
        return address

    def _add(self, address: int, size: int, segment: int, before: int | None) -> None:
        self._sizes[address], self._segments[address] = size, segment
        if before is not None:
            self._before[address] = before

    def _release(self, address: int) -> None:
        self._unused.add(address)
        insort(self._free[self._pools[self._segments[address]]], (self._sizes[address], address))

    def _take(self, address: int) -> None:
        free = self._free[self._pools[self._segments[address]]]
        free.pop(bisect_left(free, (self._sizes[address], address)))
        self._unused.discard(address)

    def _join(self, address: int, after: int) -> None:
        """Merge two blocks; the second may be free."""
        if after in self._unused:
            self._take(after)
        self._sizes[address] += self._sizes.pop(after)
        segment = self._segments.pop(after)
        self._before.pop(after, None)
        following = address + self._sizes[address]
        if self._segments.get(following) == segment:
            self._before[following] = address

    def _drop(self, key: int, block: int) -> None:
        if key in self._held and self._held[key][1] == block:  # otherwise it was resized, and has another block
            del self._held[key]
            self.release(block)
