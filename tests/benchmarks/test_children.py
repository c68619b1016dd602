"""A process of its own is stopped in time, tells what it raises, and its peak of memory is that of one call."""

import math
import mmap
import os
import platform
from types import SimpleNamespace

import allocator
import answers
import children
import pytest
import torch
from questions import Case, Variant


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
def test_a_peak_is_that_of_what_is_held_where_what_is_freed_is_given_back(monkeypatch):
    monkeypatch.setattr(children, "_start_method", "spawn")  # a fork would have the holes of all tests before
    assert 23 * 2**20 < children.in_child(grown_after, allocator.give_back_freed_memory) < 26 * 2**20
    assert children.in_child(grown_after, allocator.keep_freed_memory) < 2**20  # there is room left from before


class Setting:
    """Has one case."""

    effort, part, device, threads = "dry", "", "cpu", 1

    def __init__(self, case):
        self._case = case

    def prepare(self):
        return torch.device("cpu")

    def find(self, question, name):
        return self._case


@pytest.mark.parametrize(("can_forget", "is_slow", "samples"), [(True, False, 2), (True, True, 1), (False, False, 1)])
def test_a_peak_is_that_of_a_second_sample_where_that_of_the_first_can_be_forgotten(
    monkeypatch, can_forget, is_slow, samples
):
    taken = []
    monkeypatch.setattr(answers, "give_back_freed_memory", lambda: None)
    monkeypatch.setattr(answers, "forgets_peak", lambda _: can_forget)
    monkeypatch.setattr(answers, "peak_memory", lambda sample, _: sample())
    case = Case("a case", lambda _: {"one": Variant(lambda: taken.append(0) or 0.0)}, is_slow=is_slow)
    answers.memory(Setting(case), "a question", "a case", "one")
    assert len(taken) == samples


def test_what_is_freed_is_given_back_from_before_anything_is_made_and_kept_for_times(monkeypatch):
    order = []
    monkeypatch.setattr(answers, "give_back_freed_memory", lambda: order.append("give back"))
    monkeypatch.setattr(answers, "keep_freed_memory", lambda: order.append("keep"))
    monkeypatch.setattr(answers, "peak_memory", lambda sample, _: order.append("peak") or sample() or 1)
    one = Variant(lambda: order.append("sample") or 1.0)
    case = Case("a case", lambda _: order.append("make") or {"one": one})
    answers.times(Setting(case), "a question", "a case")
    assert order[:5] == ["give back", "make", "peak", "sample", "keep"]
    assert set(order[5:]) == {"sample"}
    order.clear()
    answers.memory(Setting(case), "a question", "a case", "one")
    assert order == ["give back", "make", "sample", "peak", "sample"]


def test_where_the_system_forgets_no_peak_that_is_told(monkeypatch):
    monkeypatch.setattr(children, "Path", lambda _: SimpleNamespace(write_text=unwritable))
    assert not children.forgets_peak(torch.device("cpu"))


def unwritable(_):
    raise PermissionError
