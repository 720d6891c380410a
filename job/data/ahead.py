"""Read a data set beside other work: importing TensorFlow takes seconds and needs nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from job.console import Reporter
from job.data import fetch, sources
from job.data.records import Dataset

Read = Callable[[], Dataset]


def begin_reading(data: str | None, reporter: Reporter) -> Read:
    """Begin to read where `fetch.locate` would, in a thread, if that is on a disk.

    What is fetched or in a bucket is read by the call: a download shows its progress, and storage's client
    imports what TensorFlow imports, too.

    Returns:
        What waits for the data set and returns it; it raises as `fetch.locate` and `sources.load` do.
    """
    source, absent = fetch.find(data)
    if absent or source.startswith("gs://"):
        return lambda: sources.load(fetch.locate(data, reporter))
    reader = ThreadPoolExecutor(1, thread_name_prefix="data")
    reading = reader.submit(sources.load, source)
    reader.shutdown(wait=False)  # its thread ends with its work
    return reading.result
