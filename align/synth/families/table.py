"""The table of families, and the type of an entry of `families`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, SerializeAsAny, Tag, WrapValidator
from pydantic_core.core_schema import ValidatorFunctionWrapHandler

from align.registry import class_tag, pick_class
from align.synth.families.dialogues import Dialogues, TwoTurn
from align.synth.families.documents import ClosedQA
from align.synth.families.family import Family
from align.synth.families.incapable import Incapable
from align.synth.families.instructions import Instructions, RelaxedConstraint
from align.synth.families.problems import CodeProblems, Keywords, MathsProblems
from align.synth.families.questions import OpenQA, Prompts, ReviseOpenQA, ReviseWriting, Writing
from align.synth.families.topic_following import TopicFollowing
from align.synth.families.topics import Subtopics, Topics
from align.synth.families.user_prompts import Magpie, SelfInstruct
from align.synth.genetic.family import GeneticCode

FAMILIES: dict[str, type[Family]] = {
    "self_instruct": SelfInstruct,
    "topics": Topics,
    "subtopics": Subtopics,
    "prompts": Prompts,
    "open_qa": OpenQA,
    "revise_open_qa": ReviseOpenQA,
    "writing": Writing,
    "revise_writing": ReviseWriting,
    "closed_qa": ClosedQA,
    "keywords": Keywords,
    "maths_problems": MathsProblems,
    "code_problems": CodeProblems,
    "instructions": Instructions,
    "two_turn": TwoTurn,
    "dialogues": Dialogues,
    "incapable": Incapable,
    "topic_following": TopicFollowing,
    "relaxed_constraint": RelaxedConstraint,
    "magpie": Magpie,
    "genetic_code": GeneticCode,
}


def family_class(name: str) -> type[Family]:
    """Return the family of a name in FAMILIES, or a user's own by its dotted path `module:Class`."""
    return pick_class(FAMILIES, name, Family, "family")


def _other_family(value: Any, handler: ValidatorFunctionWrapHandler) -> Family:  # noqa: ANN401 - what pydantic gives
    if isinstance(value, Family):
        return value
    if not isinstance(value, Mapping) or "family" not in value:
        raise ValueError(f"an entry needs a family; available: {', '.join(sorted(FAMILIES))}")
    return family_class(str(value["family"])).model_validate(value)


# An entry of `families`: a discriminated union over `family`
AnyFamily = Annotated[
    Annotated[SelfInstruct, Tag("SelfInstruct")]
    | Annotated[Topics, Tag("Topics")]
    | Annotated[Subtopics, Tag("Subtopics")]
    | Annotated[Prompts, Tag("Prompts")]
    | Annotated[OpenQA, Tag("OpenQA")]
    | Annotated[ReviseOpenQA, Tag("ReviseOpenQA")]
    | Annotated[Writing, Tag("Writing")]
    | Annotated[ReviseWriting, Tag("ReviseWriting")]
    | Annotated[ClosedQA, Tag("ClosedQA")]
    | Annotated[Keywords, Tag("Keywords")]
    | Annotated[MathsProblems, Tag("MathsProblems")]
    | Annotated[CodeProblems, Tag("CodeProblems")]
    | Annotated[Instructions, Tag("Instructions")]
    | Annotated[TwoTurn, Tag("TwoTurn")]
    | Annotated[Dialogues, Tag("Dialogues")]
    | Annotated[Incapable, Tag("Incapable")]
    | Annotated[TopicFollowing, Tag("TopicFollowing")]
    | Annotated[RelaxedConstraint, Tag("RelaxedConstraint")]
    | Annotated[Magpie, Tag("Magpie")]
    | Annotated[GeneticCode, Tag("GeneticCode")]
    | Annotated[SerializeAsAny[Family], WrapValidator(_other_family), Tag("Family")],
    Discriminator(lambda value: class_tag(value, "family", FAMILIES, Family)),
]
