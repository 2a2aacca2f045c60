"""What every section is made of: unknown keys refused, partial settings completed, common kinds of number."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of the tree; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keep_other_defaults(cls, values: Any) -> Any:
        """Who sets `fake.weight_decay` keeps the learning rate that `fake` has by default."""
        return fill_defaults(cls, values)


def without_nulls(given: Any) -> Any:
    """A mapping without what an overlay takes away of its base by setting it to null, which the environment spells."""
    if not isinstance(given, dict):
        return given
    return {name: value for name, value in given.items() if value not in (None, "null")}


def fill_defaults(model: type[BaseModel], values: Any) -> Any:
    """Complete the given parts of a section from the defaults of that section, not from those of its class."""
    if not isinstance(values, dict):
        return values
    defaults = {name: field.default for name, field in model.model_fields.items()}
    return {name: _completed(defaults.get(name), value) for name, value in values.items()}


def _completed(default: Any, given: Any) -> Any:
    if not (isinstance(default, Section) and isinstance(given, dict)):
        return given
    values = dict(default)
    return values | {name: _completed(values.get(name), value) for name, value in given.items()}
