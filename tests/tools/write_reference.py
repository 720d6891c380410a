"""Write the generated parts of docs/reference.md: commands and options, exit codes, recipes.

`make docs` calls it. They come from Click's commands, the errors' docstrings, the Jobs' pod failure policy
and the table of recipes; `tests/docs/test_reference.py` fails when the page says something else.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import click
import yaml

from job import cli
from job.cli.options import variable_of
from job.domain import errors
from job.domain.recipe import RECIPES, Recipe
from tests.tools.regions import with_region

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference.md"
JOBS = [ROOT / "k8s" / "base" / f"20-{model}.yaml" for model in ("resnet", "plainnet")]
PROGRAM = "python -m job"


def leaves(command: click.Command = cli.cli, parent: click.Context | None = None) -> Iterator[click.Context]:
    """A context for each command that is no group, in the order of definition."""
    name = str(command.name) if parent else PROGRAM
    context = click.Context(command, parent, info_name=name, **command.context_settings)
    if isinstance(command, click.Group):
        for child in command.commands.values():
            yield from leaves(child, context)
    else:
        yield context


def commands() -> str:
    """A chapter a command: how to call it, what it does, a row for each argument and option."""
    return "\n\n".join(map(_command, leaves()))


def _command(context: click.Context) -> str:
    command = context.command
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    rows = [
        _row(parameter, context) for parameter in command.params if not getattr(parameter, "hidden", False)
    ]
    about = inspect.cleandoc(str(command.help).partition("\f")[0])
    title = f"### `{context.command_path}`"
    return "\n\n".join(
        [title, f"    {usage}", about, _table(["Option", "Variable", "Default", "Meaning"], rows)]
    )


def _row(parameter: click.Parameter, context: click.Context) -> list[str]:
    """Names, variable, default and meaning of an option or an argument, as `--help` knows them."""
    if isinstance(parameter, click.Option):
        extra = parameter.get_help_extra(context)
        names = [*parameter.opts, *parameter.secondary_opts]
        meaning = _meaning(parameter, extra.get("range", ""))
    else:
        names, meaning = [parameter.human_readable_name], "An argument, see above."
    variable = variable_of(parameter)
    return [_code(names), _code([variable] if variable else []), default_of(parameter), meaning]


def _meaning(option: click.Option, limits: str) -> str:
    """An option's help, with the choices or the range that its type allows."""
    text = str(option.help)
    if isinstance(option.type, click.Choice):
        text += f" One of {_code(list(option.type.choices))}."
    if limits:
        text += f" Range: `{limits}`."
    return text.replace("|", "\\|")


def default_of(parameter: click.Parameter) -> str:
    """A default in code style; empty where there is none, or where something else decides."""
    if parameter.required:
        return "required"
    value = parameter.to_info_dict().get("default")
    if value is None or callable(value):
        return ""
    if isinstance(value, bool):
        return "`on`" if value else "`off`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def exit_codes() -> str:
    """Each exit code, its error, what the error means and what the Jobs' failure policy does about it."""
    known = {0: ["", "Complete, also when it already was."]}
    known[errors.JobError.exit_code] = ["", "Unexpected; the traceback says where."]
    for kind in kinds():
        known[kind.exit_code] = [_code([kind.__name__]), _first_paragraph(kind)]
    policy = failure_policy()
    rows = [[str(code), *known[code], policy.get(code, "counted") if code else ""] for code in sorted(known)]
    return _table(["Code", "Error", "Meaning", "Policy"], rows, first="--:")


def kinds() -> list[type[errors.JobError]]:
    """The errors that have an exit code of their own."""
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    return [kind for kind in found if issubclass(kind, errors.JobError) and kind is not errors.JobError]


def _first_paragraph(kind: type) -> str:
    return " ".join(str(inspect.getdoc(kind)).partition("\n\n")[0].split())


def failure_policy() -> dict[int, str]:
    """Exit code -> action of the Jobs' pod failure policy. Raises ValueError where the Jobs differ."""
    policies = [_policy_of(path) for path in JOBS]
    if any(policy != policies[0] for policy in policies):
        raise ValueError(f"the Jobs must have one failure policy, but have {policies}")
    return policies[0]


def _policy_of(path: Path) -> dict[int, str]:
    (job,) = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    decided: dict[int, str] = {}
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        for code in rule.get("onExitCodes", {}).get("values", []):
            decided.setdefault(code, rule["action"])
    return decided


def recipes() -> str:
    """The values of each recipe, a column a recipe."""
    names = [field.name for field in fields(Recipe) if field.name != "name"]
    rows = [[f"`{name}`", *(f"`{getattr(recipe, name)}`" for recipe in RECIPES.values())] for name in names]
    return _table(["Value", *map(_code, ([name] for name in RECIPES))], rows)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], first: str = ":--") -> str:
    rule = [first, *[":--"] * (len(titles) - 1)]
    return "\n".join(
        "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"
        for cells in [titles, rule, *rows]
    )


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def renewed(page: str) -> str:
    """The page with its generated parts made again."""
    for name, text in {"commands": commands(), "exit codes": exit_codes(), "recipes": recipes()}.items():
        page = with_region(page, name, text)
    return page


def main() -> None:
    """Write the page."""
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
