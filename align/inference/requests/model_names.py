"""The names under which servers offer models, as /v1/models lists them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ValidationError

from align.errors import InputError
from align.inference.requests.connection import Answer
from align.inference.settings import ServerSettings

OK = 200
MAX_LISTED = 5  # models of a server in an error


class _Listed(BaseModel):
    id: str


class _ModelList(BaseModel):
    data: list[_Listed]


def listed_models(answer: Answer) -> list[str] | None:
    """Return the models in the answer of a server's /v1/models; None if it is not a list of models."""
    if answer.status != OK:
        return None
    try:
        return [each.id for each in _ModelList.model_validate_json(answer.body).data]
    except ValidationError:
        return None


def name_at_server(model: str, name: str, settings: ServerSettings, listed: list[str] | None) -> str:
    """Return the server's name for a model; raise `InputError` where it does not list it.

    `name` is the policy's, `model` its folder or Hub ID. A server without a list is trusted only for a name that the
    user wrote, and not for a policy of a step, in whose place it could offer another.
    """
    given = settings.models.get(name)
    folder = Path(model)
    url = settings.base_url.rstrip("/")
    names = [given] if given is not None else list(dict.fromkeys([name, model, str(folder.absolute())]))
    if listed is None:
        if given is None and folder.is_dir():
            raise InputError(
                f"{url}/models lists no models, so it is not known whether the server has {name!r}: give its name "
                f"there, models: {{{name}: NAME}}"
            )
        return given or model
    found = next((each for each in names if each in listed), None)
    if found is None:
        shown = ", ".join(map(repr, listed[:MAX_LISTED])) or "no model"
        more = f" and {len(listed) - MAX_LISTED} more" if len(listed) > MAX_LISTED else ""
        raise InputError(
            f"{url} lists {shown}{more}, not {names[0]!r}: start the server with this name, or give its name there, "
            f"models: {{{name}: NAME}}"
        )
    return found
