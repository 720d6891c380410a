"""Each promise of docs/promises.md names the tests that hold it; test_pages.py asks whether they exist."""

from __future__ import annotations

import re

from tests.docs.pages import PROMISES, codes, table


def test_every_promise_names_the_tests_that_hold_it() -> None:
    held = re.findall(r"^- (.+?): (`tests/.+`)$", PROMISES, re.MULTILINE)
    promises = [row["What happens"] for row in table(PROMISES)]
    assert len(promises) >= 19
    assert [promise for promise, _ in held] == promises
    for _, tests in held:
        assert all(re.fullmatch(r"tests/[\w/]+\.py::\w+", test) for test in codes(tests)), tests
