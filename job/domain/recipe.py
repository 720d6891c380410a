"""Training recipes: optimizer, schedule and augmentation. A new recipe is one entry of ``RECIPES``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from job.domain.errors import UsageError

LARGEST_PADDING = 32  # pixels; a crop of the padding alone would show nothing


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained; every value belongs to the run's identity."""

    name: str
    optimizer: Literal["adam", "sgd", "muon"]
    learning_rate: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0  # coupled: joins the gradient, kernels only
    schedule: Literal["constant", "steps", "triangle"] = "constant"
    crop_padding: int = 0  # pixels of zeros on each side before a random 32x32 crop; 0: no crop
    flip: bool = False  # left-right, with probability one half
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.learning_rate) or self.learning_rate <= 0:
            raise UsageError(
                f"--learning-rate must be a finite number above 0, not {self.learning_rate}; "
                "example: --learning-rate 0.001"
            )
        if self.optimizer == "muon" and (not self.nesterov or not self.momentum or self.weight_decay):
            raise UsageError(
                "muon is Nesterov SGD with momentum, and coupled weight decay would only turn its steps, but "
                f"nesterov is {self.nesterov}, momentum {self.momentum} and weight_decay {self.weight_decay}"
            )
        if self.optimizer == "adam" and (self.nesterov or self.momentum):
            raise UsageError(
                "adam has moments of its own, so it takes neither momentum nor nesterov, but momentum is "
                f"{self.momentum} and nesterov {self.nesterov}"
            )
        if self.nesterov and not self.momentum:
            raise UsageError("nesterov needs a momentum above 0, but momentum is 0; example: momentum = 0.9")
        for name, value, most in (
            ("momentum", self.momentum, 1),
            ("label_smoothing", self.label_smoothing, 1),
            ("weight_decay", self.weight_decay, math.inf),
            ("crop_padding", self.crop_padding, LARGEST_PADDING),
        ):
            if not 0 <= value < most:
                raise UsageError(f"{name} must be at least 0 and below {most}, not {value}")

    def rate(self, step: int, total_steps: int) -> float:
        """Learning rate of optimizer step ``step``, counted from 0 in a run of ``total_steps``."""
        progress = step / total_steps
        if self.schedule == "steps":  # He et al. 2015, section 4.2: divided by 10 at 32k and 48k of 64k steps
            return self.learning_rate * (1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01)
        if self.schedule == "triangle":  # one cycle: up over the first fifth, then down to nothing
            return self.learning_rate * min((step + 1) / (0.2 * total_steps + 1), (1 - progress) / 0.8)
        return self.learning_rate

    @property
    def depends_on_length(self) -> bool:
        """Whether the rate of a step changes with the number of epochs of the whole run."""
        return self.schedule != "constant"


RECIPES = {
    # The article: Keras's Adam at its defaults, nothing else. It over-fits, and that is part of the article.
    "article": Recipe(name="article", optimizer="adam", learning_rate=0.001),
    # He et al. 2015, Deep Residual Learning for Image Recognition, section 4.2.
    "he": Recipe(
        name="he",
        optimizer="sgd",
        learning_rate=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        schedule="steps",
        crop_padding=4,
        flip=True,
    ),
    # Few epochs: Jordan et al. 2024, Muon, in the one cycle of Smith and Topin 2018, Super-Convergence. Tuned
    # on a hold-out, for the 20-layer network with 16 filters.
    "fast": Recipe(
        name="fast",
        optimizer="muon",
        learning_rate=0.1,
        momentum=0.8,
        nesterov=True,
        schedule="triangle",
        crop_padding=2,
        flip=True,
        label_smoothing=0.1,
    ),
}


def own_recipe(values: Mapping[str, Any]) -> Recipe:
    """A recipe of the user's own, as a table of names and values; its name is "own" if it has none.

    Raises:
        UsageError: a name is unknown or missing, or a value has another type or is no choice.
    """
    types = get_type_hints(Recipe)
    if unknown := values.keys() - types.keys():
        raise UsageError(f"a recipe has {', '.join(types)}, but no {', '.join(sorted(unknown))}")
    values = {"name": "own", **values}
    needed = [field.name for field in fields(Recipe) if field.default is MISSING and field.name != "name"]
    if missing := [name for name in needed if name not in values]:
        raise UsageError(f"a recipe needs {' and '.join(needed)}, but there is no {' and no '.join(missing)}")
    for name, value in values.items():
        _check_value(name, value, types[name])
    if values["name"] in RECIPES or not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", values["name"]):
        raise UsageError(
            "a recipe's name must hold lower-case letters, digits and '-' only (32 at most) and be none of "
            f'{", ".join(RECIPES)}, not {values["name"]!r}; example: name = "own"'
        )
    typed: dict[str, Any] = {
        name: float(value) if types[name] is float else value for name, value in values.items()
    }
    return Recipe(**typed)


def _check_value(name: str, value: Any, wanted: Any) -> None:
    if choices := get_args(wanted):
        if value not in choices:
            raise UsageError(f"a recipe's {name} must be one of {', '.join(choices)}, not {value!r}")
    elif type(value) is not wanted and not (wanted is float and type(value) is int):
        raise UsageError(f"a recipe's {name} must be a {wanted.__name__}, not {value!r}")
