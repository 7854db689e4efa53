"""Recipes that have grown since the first files with them: what is newer is written only where it is set."""

from typing import Any, ClassVar

from pydantic import SerializationInfo, SerializerFunctionWrapHandler, model_serializer

from mmkd.cache_tools.recipes.recipe import WHOLE, Recipe


class GrowingRecipe(Recipe):
    """A recipe whose newer fields are left out of what is written where they have their default.

    So runs, checkpoints and experts of an earlier version keep their identity. `model_dump(context=WHOLE)` has all.
    """

    first_fields: ClassVar[frozenset[str]]
    """Fields of the first version, which are always written."""

    @model_serializer(mode="wrap")
    def _without_newer_defaults(
        self, handler: SerializerFunctionWrapHandler, info: SerializationInfo
    ) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if info.context == WHOLE:
            return fields
        declared = type(self).model_fields
        return {
            name: value
            for name, value in fields.items()
            if name in self.first_fields
            or getattr(self, name) != declared[name].get_default(call_default_factory=True)
        }
