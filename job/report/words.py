"""Values as words."""

from __future__ import annotations

import re
from typing import Any


def shortened(value: Any) -> str:
    """A value as text; of a SHA-256 its first 12 digits."""
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def percent(fraction: float | None) -> str:
    """A fraction as text; of no value a dash."""
    return "-" if fraction is None else f"{fraction:.2%}"
