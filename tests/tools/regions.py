"""The parts of a page that a program writes, between ``<!-- NAME -->`` and ``<!-- end of NAME -->``."""

from __future__ import annotations

import re


def with_region(page: str, name: str, text: str) -> str:
    """The page with another text in its one region of this name. Raises ValueError where it has not one."""
    start, end = re.escape(f"<!-- {name} -->\n"), re.escape(f"<!-- end of {name} -->")
    renewed, count = re.subn(f"(?<={start}).*?(?={end})", lambda _: f"\n{text}\n\n", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"a page must have the region {name!r} once, but this one has it {count} times")
    return renewed
