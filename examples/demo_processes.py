"""The steps of a demo in several processes at once, one thread each: tiny models leave cores idle."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

from examples.demo_report import DemoPart, StepEvent


def step_events(parts: Sequence[DemoPart], processes: int, prepare: Callable[[], None]) -> Iterator[StepEvent]:
    """Do the steps of all parts, chain by chain, each chain in one process.

    Args:
        parts: before their first step; each process gets copies.
        processes: how many work at once.
        prepare: called first in each of them; of a module.

    Raises:
        RuntimeError: a step failed; its process has told how on stderr.
    """
    chains = [
        (part, chain) for part, one in enumerate(parts) for chain in dict.fromkeys(step.chain for step in one.steps())
    ]
    copies = [pickle.dumps(part) for part in parts]
    context, connections, workers = get_context("spawn"), [], []
    try:
        for _ in range(min(processes, len(chains))):
            connection, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, prepare), daemon=True)
            worker.start()
            theirs.close()  # what is left here would hide that the process has ended
            workers.append(worker)
            connections.append(connection)
        waiting = list(connections)
        while waiting:
            for connection in wait(waiting):
                try:
                    event = connection.recv()
                except EOFError:
                    raise RuntimeError("A step of the demo failed, see above.") from None
                if event is not None:
                    yield event
                elif chains:
                    part, chain = chains.pop(0)
                    connection.send((part, chain, copies[part]))
                else:
                    connection.send(None)  # ends by itself, with what it holds put away
                    waiting.remove(connection)
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    finally:
        for worker in workers:
            worker.join()


def _work(connection: Connection, prepare: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted demo ends its processes itself
    os.environ["TQDM_DISABLE"] = "1"  # bars of several processes on one line
    prepare()
    while True:
        connection.send(None)  # ready for the next chain
        given = connection.recv()
        if given is None:
            return
        position, chain, part = given
        for index, step in enumerate(pickle.loads(part).steps()):
            if step.chain == chain:
                connection.send(StepEvent(position, index))
                started = time.perf_counter()
                result = step.action()
                seconds = time.perf_counter() - started
                connection.send(StepEvent(position, index, seconds, result))
