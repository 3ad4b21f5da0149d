"""Base of every method's settings, and how a name in YAML becomes one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from pipeline.stage import Settings

if TYPE_CHECKING:
    from stages.models.encoder import Encoder
    from stages.pretrain.methods.method import Method


class MethodSettings(Settings):
    """`method:` in YAML. A subclass declares `terms`, the inputs that only it needs, and its own knobs."""

    variant_group: ClassVar[str | None] = "tessera.methods"
    terms: ClassVar[tuple[str, ...]]  # the names that `weights` may scale
    default_weights: ClassVar[Mapping[str, float]] = {}  # where a paper's weights are not 1; the config's come on top

    name: str = Field(description="entry point in the group tessera.methods")
    weights: dict[str, float] = Field(
        default_factory=dict,
        validate_default=True,
        description="term -> weight; the others keep the method's own, 1 unless it says otherwise",
    )

    @field_validator("weights")
    @classmethod
    def _on_top_of_the_defaults(cls, weights: dict[str, float]) -> dict[str, float]:
        return {**cls.default_weights, **weights}  # all of them: what weighed a term belongs to the fingerprint

    @model_validator(mode="after")
    def _weights_name_terms(self) -> MethodSettings:
        unknown = sorted(set(self.weights) - set(self.terms))
        if unknown:
            raise ValueError(f"weights: no such term {', '.join(unknown)}; {self.name} has {', '.join(self.terms)}")
        return self

    def term_weights(self) -> dict[str, float]:
        """Every term with its weight, in the method's order: what the loop sums."""
        return {term: self.weights.get(term, 1.0) for term in self.terms}

    def as_host(self) -> MethodSettings:
        """These settings where a regulariser that compares two views of an image wraps the method (DSA)."""
        return self

    @abstractmethod
    def build(self, encoder: Encoder, *, total_steps: int, steps_per_epoch: int, global_batch: int) -> Method:
        """The method around a freshly built student encoder. Imports torch here, not above."""


def method_settings(value: Any) -> Any:
    """The settings object for a mapping with a `name`; used by the pre-train stage's config as a validator."""
    if isinstance(value, MethodSettings):
        return value
    if not isinstance(value, dict) or "name" not in value:
        raise ValueError(f"a method is a mapping with a name, one of {', '.join(method_names())}")
    for entry in entry_points(group="tessera.methods"):
        if entry.name == value["name"]:
            settings_class: type[MethodSettings] = entry.load()
            return settings_class.model_validate(value)
    raise ValueError(f"no method is called {value['name']!r}; there are {', '.join(method_names())}")


def method_names() -> list[str]:
    return sorted({entry.name for entry in entry_points(group="tessera.methods")})
