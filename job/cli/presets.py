"""Settings that are not typed: those of a TOML file, and those of an existing run. Typed ones win."""

from __future__ import annotations

import tomllib
from contextlib import closing
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from job.domain.disk import disk_errors
from job.domain.errors import UsageError
from job.domain.recipe import own_recipe
from job.domain.settings import Cadence

# Of a run's settings, those that do not belong to one machine or one attempt.
LASTING = ("epochs", "xla", "deterministic", "keep", "grace_seconds")


def use_file(context: click.Context, _: click.Parameter, path: str | None) -> None:
    """Take defaults from a file; those of ``--like`` stay below them."""
    if path:
        context.default_map = {**(context.default_map or {}), **_from_file(path, context.command)}


def use_run(context: click.Context, _: click.Parameter, location: str | None) -> None:
    """Take defaults from a run; those of ``--config`` stay above them."""
    if location:
        context.default_map = {**_from_run(location), **(context.default_map or {})}


def _from_file(path: str, command: click.Command) -> dict[str, Any]:
    with disk_errors("read", path):
        content = Path(path).read_bytes()
    try:
        table = tomllib.loads(content.decode())
    except ValueError as error:
        raise UsageError(f"{path} must be a TOML file, but: {error}") from error
    known = {str(item.name): item for item in command.params if not item.is_eager}
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            close = get_close_matches(name, known, 1) or sorted(known)
            raise UsageError(f"{path}: {key} is no option; did you mean {', '.join(close)}?")
        values[name] = _value(path, name, value)
    return values


def _value(path: str, name: str, value: Any) -> Any:
    """A value as its option's type takes it: as text, so that no 2.5 becomes a 2 and no true a 1."""
    if name == "recipe" and isinstance(value, dict):
        try:
            return own_recipe(value)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
    if name == "blocks" and isinstance(value, list):
        return ",".join(map(str, value))
    if not isinstance(value, bool | int | float | str):
        raise UsageError(f"{path}: {name} must be a number, a text, true or false, not {value!r}")
    return str(value)


def _from_run(location: str) -> dict[str, Any]:
    from job.data.sources import of_run
    from job.run.reader import config_of
    from job.store.location import open_store

    with closing(open_store(location)) as store:
        store.check(write=False)
        identity, settings = config_of(store)
    values = {name: settings.get(name) for name in LASTING}
    if cadence := settings.get("commit_every"):
        values["commit_every"] = Cadence(**cadence)
    values |= {
        name: getattr(identity, name)
        for name in ("recipe", "batch_size", "seed", "holdout", "precision", "sync_batch_norm")
    }
    network = identity.network
    values |= {"model": network.model, "blocks": network.blocks, "filters": network.filters}
    values["data"] = of_run(identity.data_sha256, settings.get("data"))
    return {name: value for name, value in values.items() if value is not None}
