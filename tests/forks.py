"""Processes that work together."""

from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess


def run_together(processes: Sequence[BaseProcess], seconds: float = 180) -> None:
    """Run processes that wait for each other; when one fails, or after some seconds, the others are not waited for."""
    for process in processes:
        process.start()
    running = {process.sentinel: process for process in processes}
    while running and (ended := wait(list(running), seconds)):
        for sentinel in ended:
            running.pop(sentinel).join()
        if any(process.exitcode for process in processes):
            break
    for process in running.values():
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(processes)
