"""How targets and labels make the loss of a step: fixed numbers, or such that change over the run or by head."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from mmkd.data_manifests.errors import InputError
from mmkd.student.recipes.growing import GrowingRecipe

Points = tuple[tuple[float, float], ...]
"""(share of the run done, value), in order; linear between them, constant before the first and after the last."""
Course = float | Points
"""A number, or one that changes over the run."""
ByHead = Course | dict[str, Course]
"""The same for all heads, or one for each that is named; the others have the default."""
FORMS = "a number, points [[share of the run, value], ...], or one of the two for each head by name"


def check_course(value: Any) -> Any:
    """Return a number, or points as tuples; raise ValueError for points that are none."""
    if not isinstance(value, list | tuple):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"must be {FORMS}")
        return float(value)
    try:
        points = tuple((float(share), float(number)) for share, number in value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"must be {FORMS}") from error
    shares = [share for share, _ in points]
    if not shares or shares[0] < 0 or shares[-1] > 1 or any(a >= b for a, b in pairwise(shares)):
        raise ValueError("the points' shares of the run must rise from 0 or more to at most 1")
    return points


def check_by_head(value: Any) -> Any:
    """Return a course, or courses by head; raise ValueError for anything else."""
    if isinstance(value, Mapping):
        if not value:
            raise ValueError(f"must be {FORMS}")
        return {str(head): check_course(course) for head, course in value.items()}
    return check_course(value)


def courses(value: ByHead) -> list[Course]:
    """Return the courses of all heads."""
    return list(value.values()) if isinstance(value, dict) else [value]


def values_of(course: Course) -> list[float]:
    """Return the values of a course at its points."""
    return [course] if isinstance(course, float) else [value for _, value in course]


def value_at(course: Course, share: float) -> float:
    """Return the value when a share 0..1 of the run is done."""
    if isinstance(course, float):
        return course
    return float(np.interp(share, [point[0] for point in course], [point[1] for point in course]))


def within(low: float, high: float, *, open_below: bool = False) -> BeforeValidator:
    """Return the check that each number of a course by head lies within bounds."""

    def check(value: Any) -> Any:
        found = check_by_head(value)
        for course in courses(found):
            for number in values_of(course):
                if not (low <= number <= high) or (open_below and number == low):
                    raise ValueError(
                        f"must be {'above' if open_below else 'at least'} {low:g} and at most {high:g}"
                    )
        return found

    return BeforeValidator(check)


@dataclass(frozen=True)
class HeadLoss:
    """The numbers of one head's loss at one step."""

    temperature: float
    """T of teacher and student."""
    label_weight: float
    """Weight of the label term, 0..1; distillation has the rest."""


@dataclass(frozen=True)
class LossAt:
    """The numbers of the loss at one step."""

    by_head: Mapping[str, HeadLoss]
    """Of the heads that the recipe names."""
    others: HeadLoss
    """Of all other heads."""
    without_target: Literal["drop", "label-only"]
    """What becomes of a clip without a target."""

    def of(self, head: str) -> HeadLoss:
        """Return a head's numbers."""
        return self.by_head.get(head, self.others)


class LossRecipe(GrowingRecipe):
    """How targets and labels make the loss (see mmkd.student.loss.losses)."""

    first_fields = frozenset({"temperature", "label_weight", "without_target"})

    temperature: Annotated[ByHead, within(0, 1000, open_below=True)] = Field(
        1.0,
        description="T in T^2 KL(softmax(z_T / T) || softmax(z_S / T)); larger teaches more of the order of "
        f"the unlikely classes (later work of the same first author: 10); {FORMS}",
    )
    label_weight: Annotated[ByHead, within(0, 1)] = Field(
        0.0, description=f"weight of the label term, 0 to 1; distillation has the rest; {FORMS}"
    )

    def check_heads(self, heads: Collection[str]) -> None:
        """Raise InputError for a head that is named and does not exist."""
        for name in ("temperature", "label_weight"):
            value = getattr(self, name)
            for head in value if isinstance(value, dict) else ():
                if head not in heads:
                    raise InputError(f"loss.{name}: there is no head {head!r}; the heads are {', '.join(heads)}")


class LossOptions(LossRecipe):
    """The loss with what `teacher.missing` says of clips without a target: what the training loop reads."""

    without_target: Literal["drop", "label-only"] = Field(
        "drop", description="a clip without a target is left out, or learns from its label with weight 1"
    )

    def at(self, share: float) -> LossAt:
        """Return the numbers of a step, before which a share 0..1 of the run was done."""
        named = {
            head for value in (self.temperature, self.label_weight) if isinstance(value, dict) for head in value
        }
        return LossAt(
            {head: self._head(head, share) for head in named}, self._head(None, share), self.without_target
        )

    def _head(self, head: str | None, share: float) -> HeadLoss:
        found = {}
        for name in ("temperature", "label_weight"):
            value = getattr(self, name)
            if isinstance(value, dict):
                value = value.get(head, type(self).model_fields[name].default)
            found[name] = value_at(value, share)
        return HeadLoss(**found)
