"""A process of its own is stopped in time, tells what it raises, and its peak of memory is that of one call."""

import math
import mmap
import os
import platform

import allocator
import children
import pytest
import torch


def slow(seconds, tell):
    tell("began")
    if not seconds:
        raise ValueError("no time")
    __import__("time").sleep(seconds)


def test_a_child_is_stopped_and_what_it_raises_is_told():
    told = []
    with pytest.raises(children.ChildError, match="was stopped after 2 seconds"):
        children.in_child(slow, 60, seconds=2.0, tell=told.append)
    with pytest.raises(children.ChildError, match="ValueError: no time"):
        children.in_child(slow, 0, tell=told.append)
    with pytest.raises(children.ChildError, match="its process ended with 7"):
        children.in_child(os._exit, 7)
    assert told == ["began", "began"]
    assert children.in_child(math.sqrt, 4.0) == 2.0


def test_a_peak_of_memory_is_that_of_one_call():
    def call():
        with mmap.mmap(-1, 64 * 2**20) as memory:  # not by malloc, which may have some left
            for place in range(0, len(memory), mmap.PAGESIZE):
                memory[place] = 1

    grown = [children.peak_memory(each, torch.device("cpu")) for each in (call, lambda: None, call)]
    assert grown[1] < 8 * 2**20
    assert all(60 * 2**20 < grown[place] < 72 * 2**20 for place in (0, 2))


def grown_after(freed):
    """Return by how much the memory grows for 24 MiB at a time, beside holes of 8 MiB that were left before."""
    freed()
    held = [torch.ones(2**20) for _ in range(16)]
    del held[::2]

    def call():
        for _ in range(4):
            torch.ones(6 * 2**20)

    call()
    return children.peak_memory(call, torch.device("cpu"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_a_peak_is_that_of_what_is_held_where_what_is_freed_is_given_back():
    assert 23 * 2**20 < children.in_child(grown_after, allocator.give_back_freed_memory) < 26 * 2**20
    assert children.in_child(grown_after, allocator.keep_freed_memory) < 2**20  # there is room left from before
