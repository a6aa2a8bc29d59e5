"""Whether servers can follow the policies of a recipe, and whether the commands that steps start run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from align.distributed.slurm import check_installed
from align.errors import ErrorList, InputError, Location, within
from align.inference.managed.version import engine_version
from align.inference.settings import ServerSettings
from align.registry import suggest
from align.stages.base import UsedEngine
from align.workflow.recipe.schema import Recipe


class _Use(NamedTuple):
    """A server that a step asks for policies or models."""

    server: ServerSettings
    loc: Location
    policies: frozenset[str]
    models: frozenset[str]


def check_servers(recipe: Recipe) -> None:
    """Raise if one server is asked for several policies and nothing says how it follows them.

    It would be asked for a name that it does not know, after all training before it, or answer with one and the same
    model in the name of all.
    """
    by_url: dict[str, list[_Use]] = {}
    for use in _uses(recipe):
        by_url.setdefault(use.server.base_url.rstrip("/"), []).append(use)
    errors = ErrorList()
    for uses in by_url.values():
        policies = sorted({policy for use in uses for policy in use.policies})
        models = {model for use in uses for model in use.models}
        for use in uses:
            with errors.collect(), within(*use.loc):
                _check_names(use.server, policies, {*policies, *models})
                if len(policies) > 1:
                    _check_follows(use, policies)
    errors.raise_found()


def check_commands(recipe: Recipe, steps: Iterable[str], errors: ErrorList) -> None:
    """Add an error for each managed engine of the steps whose command is missing or does not run, and for Slurm's."""
    steps = list(steps)
    for name in steps:
        if recipe.steps[name].slurm is not None:
            with errors.collect(), within(*recipe.location(name, ("slurm",))):
                check_installed()
    for name, used in _engines(recipe, steps):
        managed = used.engine.managed
        if managed is not None:
            with errors.collect(), within(*recipe.location(name, used.loc), managed.kind):
                engine_version(managed)


def _engines(recipe: Recipe, steps: Iterable[str]) -> Iterator[tuple[str, UsedEngine]]:
    return ((name, used) for name in steps for used in recipe.steps[name].engines())


def _uses(recipe: Recipe) -> Iterator[_Use]:
    for name, (engine, loc, policies, models) in _engines(recipe, recipe.steps):
        if engine.server is not None:
            at = (*recipe.location(name, loc), "server")
            yield _Use(engine.server, at, frozenset(policies), frozenset(models))


def _check_names(server: ServerSettings, policies: list[str], known: set[str]) -> None:
    """Raise for names of policies that are not asked for, and for one name of several policies."""
    for name, there in server.models.items():
        if name not in known:
            raise InputError(f"nothing called {name!r} is sampled; {suggest(name, known)}", ("models",))
        same = [other for other in policies if server.models.get(other) == there]
        if len(same) > 1 and server.refresh is None:
            raise InputError(
                f"{' and '.join(same)} are both {there!r} there; different policies need different names, or refresh",
                ("models",),
            )


def _check_follows(use: _Use, policies: list[str]) -> None:
    """Raise unless the server's settings say where it has the policies."""
    server = use.server
    if server.refresh is None and (missing := sorted(use.policies - server.models.keys())):
        raise InputError(
            f"this server is to sample {len(policies)} policies ({', '.join(policies)}), and nothing says how it "
            f"follows them: let align start a server for each (engine: {{vllm: {{}}}}), or give the server's name of "
            f"each in models, such as {{{missing[0]}: NAME}}, or refresh, a command with {{folder}} that loads one"
        )
