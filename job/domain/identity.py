"""A run's identity: everything that decides the bits it ends with, and the name that follows from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from job.domain.network import Network
from job.domain.recipe import Recipe

FORMAT = 1  # of config.json; a newer one is refused, never guessed at


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that decides the bits a run ends with; the same name with another identity is refused."""

    network: Network
    recipe: Recipe
    batch_size: int  # global: images a step over all replicas
    seed: int
    holdout: int  # training images set aside for validation; 0: the test set validates, as in the article
    precision: Literal["float32", "bfloat16", "float16"]  # resolved, never "auto"
    sync_batch_norm: bool
    data_sha256: str
    epochs: int | None  # where the recipe's schedule depends on the length; else more may follow at any time

    def to_json(self) -> dict[str, Any]:
        """Flat, as config.json holds it."""
        values = asdict(self.recipe)
        return {
            "model": self.network.model,
            "blocks": list(self.network.blocks),
            "filters": self.network.filters,
            "recipe": values.pop("name"),
            "recipe_values": values,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "holdout": self.holdout,
            "precision": self.precision,
            "sync_batch_norm": self.sync_batch_norm,
            "data_sha256": self.data_sha256,
            **({} if self.epochs is None else {"epochs": self.epochs}),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Identity:
        """Inverse of :meth:`to_json`."""
        return cls(
            network=Network(model=values["model"], blocks=tuple(values["blocks"]), filters=values["filters"]),
            recipe=Recipe(name=values["recipe"], **values["recipe_values"]),
            **{key: values[key] for key in ("batch_size", "seed", "holdout", "precision", "sync_batch_norm")},
            data_sha256=values["data_sha256"],
            epochs=values.get("epochs"),
        )

    def differences(self, other: Identity) -> list[str]:
        """Fields that differ, as "field: mine, not theirs"."""
        mine, theirs = self.to_json(), other.to_json()
        return [
            f"{key}: {mine.get(key)!r}, not {theirs.get(key)!r}"
            for key in mine | theirs
            if mine.get(key) != theirs.get(key)
        ]

    @property
    def default_name(self) -> str:
        """Readable and unique: model, depth, recipe, seed and 8 hex digits of the identity."""
        text = json.dumps(self.to_json(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.network.model}{self.network.layers}-{self.recipe.name}-seed{self.seed}-{digest}"
