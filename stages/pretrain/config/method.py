"""The base of every method's settings, and how the `name` in YAML selects one of them.

Free of torch: making a plan reads settings only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from pydantic import Field, field_validator, model_validator

from pipeline.config import registry
from pipeline.errors import UsageError
from pipeline.stage import Settings
from stages.models.planned import undivided
from stages.models.settings import Backbone
from stages.pretrain.config.parts import Crops
from stages.training.settings import weight_of

METHODS = "tessera.methods"  # entry-point group


class QueueSize(NamedTuple):
    """How large a method's queue of entries from earlier steps is."""

    entries: int
    of_an_image: int = 1  # entries that an image adds in a step
    shared: bool = False  # each worker computes with a share of it, and all shares must be of one size


@dataclass(frozen=True)
class Start:
    """The encoder that a training starts from, as far as the pipeline file tells."""

    backbone: Backbone
    filtered: bool  # whether an earlier training gave it an object-aware filter


class MethodSettings(Settings):
    """`method:` in YAML.

    A subclass names the class of its method, its terms, the inputs that only this method needs, and its options.
    """

    variant_group: ClassVar[str | None] = METHODS
    builds: ClassVar[str]  # "package.module:Class" of the method; imported when the method is built, not before
    terms: ClassVar[tuple[str, ...]]  # the names that `weights` may scale
    shards: ClassVar[bool] = False  # every rank calls the same modules in every step, as `strategy: fsdp2` needs
    projects_views: ClassVar[bool] = False  # `Method.projection` is a module: one projection of every view
    default_weights: ClassVar[Mapping[str, float]] = {}  # the paper's weights that are not 1; a config replaces them

    name: str = Field(description="entry point in the group tessera.methods")
    weights: dict[str, float] = Field(
        default_factory=dict,
        validate_default=True,
        description="term -> weight; terms not named keep the method's own weight, 1 unless it sets another",
    )

    @field_validator("weights")
    @classmethod
    def _on_top_of_the_defaults(cls, weights: dict[str, float]) -> dict[str, float]:
        return {**cls.default_weights, **weights}  # the defaults too, so that they are part of the fingerprint

    @model_validator(mode="after")
    def _weights_name_terms(self) -> MethodSettings:
        unknown = sorted(set(self.weights) - set(self.terms))
        if unknown:
            raise ValueError(f"weights: no such term {', '.join(unknown)}; {self.name} has {', '.join(self.terms)}")
        return self

    def uses(self, term: str) -> bool:
        """Whether the weight of a term is not 0. A term of weight 0 is not computed."""
        return weight_of(self.weights, term) != 0

    def term_weights(self) -> dict[str, float]:
        """Every term with its weight, in the method's order. The training loop sums the terms with these weights."""
        return {term: weight_of(self.weights, term) for term in self.terms}

    def over_one_pass(self) -> tuple[str, ...]:
        """What the method computes over all images of a forward pass, in words, batch norms aside.

        It is told when a step accumulates the gradients of several passes, which then see less than the batch.
        """
        return ()

    def as_host(self) -> MethodSettings:
        """The settings to use when DSA, which compares two views of an image, wraps this method.

        A method that shows the student only one view by default overrides this, and one that DSA cannot wrap.

        Raises:
            ValueError: if DSA cannot wrap this method, with the reason.
        """
        return self

    def no_host_with(self, start: Start) -> str | None:
        """Why DSA cannot wrap this method with this encoder; None where it can."""
        return None

    def least_batch(self) -> int:
        """The fewest images that one forward pass of all workers may hold (stages/pretrain/fit.py checks it).

        It is 2 for methods whose terms compare images or normalise over them.
        """
        return 1

    def queues(self) -> dict[str, QueueSize]:
        """The method's queues of entries from earlier steps, by the dotted name of the option that sizes them."""
        return {}

    def view_sizes(self) -> Iterator[tuple[str, int]]:
        """The side in pixels of every square view that the encoder sees, with the dotted path of its setting.

        As it stands: `size`, and the size of every field of `Crops` that has any crop.
        """
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name == "size" and isinstance(value, int):
                yield name, value
            elif isinstance(value, Crops) and value.count:
                yield f"{name}.size", value.size

    def misfits(self, start: Start) -> Iterator[tuple[str, str, str]]:
        """What this method cannot do with an encoder. Asked when the plan is made; `build` checks the encoder itself.

        Yields:
            (dotted path in the method's settings, what is wrong, what to do).
        """
        yield from undivided(start.backbone, dict(self.view_sizes()))

    def build(self, encoder: Any, *, total_steps: int, steps_per_epoch: int, global_batch: int) -> Any:
        """Imports the method's class and builds the method (stages/pretrain/methods/method.py) around a student.

        Args:
            encoder: the student `Encoder`, newly built or loaded.
            total_steps: optimiser steps of the whole training.
            steps_per_epoch: optimiser steps of one epoch.
            global_batch: images of one optimiser step, of all ranks together.

        Returns:
            The `Method`.

        Raises:
            ValueError: if the method cannot use this encoder.
        """
        return registry.imported(self.builds).build(
            self, encoder, total_steps=total_steps, steps_per_epoch=steps_per_epoch, global_batch=global_batch
        )


def method_settings(value: Any) -> Any:
    """The settings of the method that a mapping's `name` selects; the validator of config fields that hold a method.

    Settings objects are returned as they are.

    Raises:
        ValueError: if the name is missing or unknown, or the settings class cannot be imported.
    """
    if isinstance(value, MethodSettings):
        return value
    known = registry.names(METHODS)
    if not isinstance(value, dict) or "name" not in value:
        raise ValueError(f"a method is a mapping with a name, one of {', '.join(known)}")
    if value["name"] not in known:
        close = difflib.get_close_matches(str(value["name"]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise ValueError(f"no method is called {value['name']!r}; {hint}")
    try:
        settings_class: type[MethodSettings] = registry.load(METHODS, value["name"])
    except UsageError as error:
        raise ValueError(str(error)) from error
    return settings_class.model_validate(value)
