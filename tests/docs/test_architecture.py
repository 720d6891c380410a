"""docs/architecture.md against the packages and their contract."""

from __future__ import annotations

import re

from tests.docs.pages import ARCHITECTURE, chapter
from tests.test_house import PACKAGES, PROJECT


def test_the_packages_are_listed_in_the_order_of_their_layers() -> None:
    listed = re.findall(r"^    job/(\w+)(?:/|\.py) ", chapter(ARCHITECTURE, "The packages"), re.MULTILINE)
    (layers,) = [
        contract["layers"]
        for contract in PROJECT["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    ]
    names = [layer.removeprefix("job.") for layer in layers]
    assert listed == names
    assert set(PACKAGES) <= set(listed)


def test_it_is_one_page() -> None:
    assert len(ARCHITECTURE.splitlines()) <= 80
