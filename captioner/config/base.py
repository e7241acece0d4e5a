"""What every section of the config is."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """Unknown fields are errors, values never change, and each field's docstring is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _rest_as_here(cls, data: Any) -> Any:
        """What a given section leaves out is as in the default here: every stage has its own."""
        if not isinstance(data, dict):
            return data
        merged = dict(data)
        for name, info in cls.model_fields.items():
            given, default = data.get(name), info.default
            if isinstance(given, dict) and isinstance(default, BaseModel):
                kind = getattr(default, "type", None)
                if given.get("type", kind) == kind:
                    merged[name] = {**dict(default), **given}
        return merged
