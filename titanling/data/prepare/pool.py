"""Worker processes. They end with the process that started them, and their end is noticed.

concurrent.futures does neither when it matters: its workers outlive a kill -9 of their parent, and cannot be ended
in the middle of a task when another one has failed.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from titanling.data.prepare.tokenizer import TokenizerFiles
from titanling.data.prepare.worker import Job, Task, Worker
from titanling.errors import UserError


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_parts(job: Job, tasks: Sequence[Task], files: TokenizerFiles) -> Iterator[Task]:
    """Make the parts of all tasks, by at most `job.workers` processes; yield each task that is done, in any order.

    With one worker, or one task, the work is done in this process, by the tokenizer of `files`. Otherwise its main
    module must be importable without running (`if __name__ == "__main__"`).
    Raises what a worker raised, `UserError` if one died.
    """
    workers = min(job.workers, len(tasks))
    if workers > 1:
        yield from _make_in_processes(job, tasks, workers)
        return
    worker = Worker(job, files)
    for task in tasks:
        worker.make(task)
        yield task


def _make_in_processes(job: Job, tasks: Sequence[Task], workers: int) -> Iterator[Task]:
    waiting = iter(tasks)
    processes: dict[Connection, BaseProcess] = {}
    busy: dict[Connection, Task] = {}
    try:
        for _ in range(workers):
            connection, process = _start(job, max(1, cores() // workers))
            processes[connection] = process
            busy[connection] = next(waiting)
            _send(connection, process, busy[connection])
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                _check(connection, processes[connection], busy[connection])
                yield busy.pop(connection)
                task = next(waiting, None)
                if task is not None:
                    busy[connection] = task
                    _send(connection, processes[connection], task)
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()


def _start(job: Job, threads: int) -> tuple[Connection, BaseProcess]:
    # Not forked: a thread of this process may hold a lock that the child would wait for.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, job, threads), daemon=True)
    process.start()
    theirs.close()  # so that the worker's end closes with it
    return ours, process


def _send(connection: Connection, process: BaseProcess, task: Task) -> None:
    """Give a worker a task."""
    try:
        connection.send(task)
    except OSError:
        raise _death(process, task) from None


def _check(connection: Connection, process: BaseProcess, task: Task) -> None:
    """Raise what became of a task, unless it is done."""
    try:
        error = connection.recv()
    except (EOFError, OSError):  # its end may come in the middle of an answer
        raise _death(process, task) from None
    if error is not None:
        raise error


def _death(process: BaseProcess, task: Task) -> UserError:
    process.join()
    code = process.exitcode or 0
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return UserError(
        f"a worker died ({how}) while it prepared {task.piece.spans[0].file.path}; if memory ran out, set fewer"
        " data.prepare.workers (--workers); run again: finished parts are kept"
    )


def _serve(connection: Connection, job: Job, threads: int) -> None:
    """A worker's life: tasks come in, what became of them goes out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # of tokenizers and gigatoken
    worker = Worker(job)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            worker.make(task)
            connection.send(None)
        except (UserError, OSError) as error:
            connection.send(error)
        except Exception:
            connection.send(RuntimeError(traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
