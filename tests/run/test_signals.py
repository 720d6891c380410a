"""Signals in real processes: each must leave with 75 in time, whatever it is doing, without TensorFlow."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from job.domain.errors import Interrupted
from job.run.signals import ECHO_SECONDS

ROOT = Path(__file__).parents[2]
PRELUDE = """
import ctypes, os, signal, sys, time
from job.run.signals import Interruption, leave
interruption = Interruption({grace})
interruption.install()
MUTEX = ctypes.create_string_buffer(128)
"""
LONG = 30.0  # seconds that no test may last
PROMPT = 2.0  # "at once", on a machine that does other work as well
STUCK = {
    "Python": "while True: sum(range(1000))",
    # A deadlock on a mutex: no signal ends it, and the main thread never runs a Python signal handler again.
    "native code": "for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(MUTEX)",
    "a system call": "os.read(os.pipe()[0], 1)",  # which Python restarts after a signal
}


@dataclass
class Child:
    process: subprocess.Popen[str]

    def send(self, number: int) -> float:
        """Signal the child and return the moment."""
        self.process.send_signal(number)
        return time.monotonic()

    def end(self, since: float) -> tuple[int, float, str]:
        """Return the exit code, the seconds that it took, and the rest of what the child said."""
        code = self.process.wait(timeout=LONG)
        seconds = time.monotonic() - since
        assert self.process.stdout is not None
        return code, seconds, self.process.stdout.read()


@contextlib.contextmanager
def child(body: str, *, grace: float = 20.0, wrapper: Sequence[str] = ()) -> Iterator[Child]:
    """Run ``body`` after a signal handler was installed; it has printed "ready" when this returns."""
    with subprocess.Popen(
        [*wrapper, sys.executable, "-u", "-c", PRELUDE.format(grace=grace) + body],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Whoever runs the tests may have been told to ignore it, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield Child(process)
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("stuck", STUCK)
def test_nothing_unsaved_ends_at_once(stuck: str, number: int) -> None:
    with child(f"print('ready')\n{STUCK[stuck]}") as process:
        code, seconds, text = process.end(process.send(number))
    assert code == Interrupted.exit_code
    assert seconds < PROMPT
    assert (
        text == "Interrupted: nothing is unsaved; what is committed is intact, the same command continues.\n"
    )


@pytest.mark.parametrize("stuck", STUCK)
def test_the_watchdog_ends_what_does_not_stop_by_itself_shortly_before_the_grace_is_over(stuck: str) -> None:
    with child(f"interruption.note_unsaved_work(True); print('ready')\n{STUCK[stuck]}", grace=2.0) as process:
        code, seconds, text = process.end(process.send(signal.SIGTERM))
    assert code == Interrupted.exit_code
    assert 1.4 < seconds < 2.0
    assert "the grace of 2 s is over" in text


@pytest.mark.parametrize("stuck", STUCK)
def test_a_second_signal_ends_at_once(stuck: str) -> None:
    with child(f"interruption.note_unsaved_work(True); print('ready')\n{STUCK[stuck]}") as process:
        process.send(signal.SIGTERM)
        time.sleep(ECHO_SECONDS + 0.5)
        assert process.process.poll() is None
        code, seconds, text = process.end(process.send(signal.SIGINT))
    assert code == Interrupted.exit_code
    assert seconds < PROMPT
    assert "a second signal came" in text


def test_one_request_that_comes_twice_is_no_second_signal() -> None:
    """``timeout`` signals the process, and then its group."""
    body = """
interruption.note_unsaved_work(True)
print("ready")
while not interruption.requested:
    time.sleep(0.01)
time.sleep(0.5)
print("saved")
leave(75)
"""
    with child(body) as process:
        process.send(signal.SIGTERM)
        time.sleep(0.2)
        code, _, text = process.end(process.send(signal.SIGTERM))
    assert (code, text) == (75, "saved\n")


def test_nohup_is_respected() -> None:
    body = """
print("ready")
time.sleep(0.5)
print(interruption.requested)
leave(0)
"""
    with child(body, wrapper=["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"]) as process:
        code, _, text = process.end(process.send(signal.SIGHUP))
    assert (code, text) == (0, "False\n")


def test_the_orderly_way_saves_and_leaves_with_its_own_code() -> None:
    body = """
interruption.note_unsaved_work(True)
assert interruption.seconds_left == float("inf")
print("ready")
while not interruption.requested:
    time.sleep(0.01)
left = interruption.seconds_left
print("saved with", 18.0 < left < 20.0)
leave(75)
"""
    with child(body) as process:
        code, seconds, text = process.end(process.send(signal.SIGTERM))
    assert (code, text) == (75, "saved with True\n")
    assert seconds < PROMPT


def test_work_that_was_saved_after_the_signal_need_not_wait() -> None:
    body = """
interruption.note_unsaved_work(True)
print("ready")
while not interruption.requested:
    time.sleep(0.01)
interruption.note_unsaved_work(False)
print("not reached")
"""
    with child(body) as process:
        code, _, text = process.end(process.send(signal.SIGTERM))
    assert code == 75
    assert "nothing is unsaved" in text
    assert "not reached" not in text


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_no_way_to_end_leaves_generated_code_behind(number: int | None, tmp_path: Path) -> None:
    """As TensorFlow makes and imports it (``autograph/pyct/loader.py``)."""
    source = tmp_path / "__autograph_generated_file1.py"
    source.write_text("x = 1")
    body = f"""
import importlib.util, py_compile
spec = importlib.util.spec_from_file_location({source.stem!r}, {str(source)!r})
sys.modules[{source.stem!r}] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
py_compile.compile(module.__file__, module.__cached__)
print("ready")
{"leave(0)" if number is None else "time.sleep(60)"}
"""
    with child(body) as process:
        code, _, _ = process.end(time.monotonic() if number is None else process.send(number))
    assert code == (0 if number is None else Interrupted.exit_code)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_other_signals_do_not_ask_to_stop() -> None:
    body = """
seen = []
signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
print("ready")
while not seen:
    time.sleep(0.01)
time.sleep(0.3)
print(interruption.requested)
leave(0)
"""
    with child(body) as process:
        code, _, text = process.end(process.send(signal.SIGUSR1))
    assert (code, text) == (0, "False\n")


def test_the_last_words_come_through_although_standard_error_is_redirected() -> None:
    body = f"""
import tempfile
print("ready")
with tempfile.TemporaryFile() as held:
    os.dup2(held.fileno(), 2)
    {STUCK["native code"]}
"""
    with child(body) as process:
        time.sleep(0.3)
        code, _, text = process.end(process.send(signal.SIGTERM))
    assert code == 75
    assert "nothing is unsaved" in text


def test_the_first_process_of_a_container_is_reached_too() -> None:
    """The kernel drops a signal that process 1 neither handles nor blocks, even SIGTERM from outside."""
    container = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*container, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let us make a process namespace")
    with child("print('ready', flush=True)\ntime.sleep(30)", wrapper=container) as process:
        first = Path(f"/proc/{process.process.pid}/task/{process.process.pid}/children").read_text().split()
        os.kill(int(first[0]), signal.SIGTERM)
        code, seconds, text = process.end(time.monotonic())
    assert code == Interrupted.exit_code
    assert seconds < PROMPT
    assert "nothing is unsaved" in text


def test_leave_flushes_and_skips_every_teardown() -> None:
    body = """
import atexit
atexit.register(lambda: print("teardown"))
print("ready")
sys.stdout = open(1, "w", buffering=10000, closefd=False)
print("last words")
leave(79)
"""
    with child(body) as process:
        code, _, text = process.end(time.monotonic())
    assert (code, text) == (79, "last words\n")


# --- the whole program


@contextlib.contextmanager
def job(*arguments: str, **environment: str) -> Iterator[Child]:
    """Run a command of the program."""
    with subprocess.Popen(
        [sys.executable, "-m", "job", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield Child(process)
        finally:
            process.kill()


def threads_that_take(number: int, pid: int) -> int:
    """How many threads of the process the kernel may deliver a signal to."""
    masks = [
        int(line.split()[1], 16)
        for status in Path(f"/proc/{pid}/task").glob("*/status")
        for line in status.read_text().splitlines()
        if line.startswith("SigBlk:")
    ]
    return sum(not mask >> (number - 1) & 1 for mask in masks)


@pytest.mark.parametrize(
    "command",
    [
        ("data", "fetch", "--from", "author", "--to", "{folder}"),
        ("data", "verify", "gs://bucket/data"),
        ("data", "grid", "grid.png", "--data", "gs://bucket/data"),
        ("compare", "gs://bucket/runs"),
        ("evaluate", "gs://bucket/runs/one"),
        ("train", "--output", "gs://bucket/runs", "--data", "sample"),
    ],
    ids=" ".join,
)
def test_every_command_hears_a_signal_whatever_threads_its_libraries_have_started(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    """NumPy's OpenBLAS starts threads when it is imported: one that blocks no signal dies of it, or, in a
    container's first process, swallows it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(120)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with job(
            *(argument.format(folder=tmp_path / "data") for argument in command),
            STORAGE_EMULATOR_HOST=address,
            JOB_ARCHIVE_URL=f"{address}/cifar.tar.gz",
        ) as process:
            connection, _ = silent.accept()  # its command is at work, all its imports done
            with connection:
                takers = threads_that_take(signal.SIGTERM, process.process.pid)
                code, _, text = process.end(process.send(signal.SIGTERM))
    assert takers == 1  # the watchdog, which waits for it
    assert code == Interrupted.exit_code, text
    assert "nothing is unsaved" in text


@pytest.mark.slow
def test_describe_hears_a_signal_while_tensorflow_is_imported() -> None:
    with job("describe", "--model", "resnet") as process:
        tasks = Path(f"/proc/{process.process.pid}/task")
        while len(list(tasks.iterdir())) < 3:  # the main thread, the watchdog, and one that a library started
            assert process.process.poll() is None
            time.sleep(0.01)
        code, _, text = process.end(process.send(signal.SIGTERM))
    assert code == Interrupted.exit_code, text
