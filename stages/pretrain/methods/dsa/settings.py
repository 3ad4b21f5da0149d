"""What a config says about `dsa`: a regulariser around any other method, in two variants. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from pipeline.stage import Input, Settings
from stages.models.settings import Backbone
from stages.pretrain.config.method import MethodSettings, QueueSize, Start, method_settings

Variant = Literal["text", "released"]
# The two terms of each variant, which have no name in common, with their weights: nu and upsilon of the paper's Eq. 17,
# and the release's lambda1 and lambda2.
WEIGHTS: Mapping[Variant, Mapping[str, float]] = {
    "text": {"dsa_am": 0.1, "dsa_con": 100.0},
    "released": {"dsa_released_arrange": 1.0, "dsa_released_constraint": 0.01},
}
BUILDS: Mapping[Variant, str] = {
    "text": "stages.pretrain.methods.dsa.method:DSA",
    "released": "stages.pretrain.methods.dsa.released:ReleasedDSA",
}
# Options that the release has no counterpart of, or has under `released` with other numbers.
OF_THE_TEXT = ("alpha", "tau", "tau_prior", "hidden", "activation", "normalise", "distance", "m_scale", "anchors")


class ReleasedSettings(Settings):
    """What the authors' release has in place of the paper's options; its defaults are those of its command line.

    Source: docs/methods.md#dsa-as-released.
    """

    pairs: Literal["difference", "concatenation"] = Field(
        "difference",
        description="what the arranging network reads of a pair; the release trains with differences, and holds "
        "concatenations unused",
    )
    temperature: float = Field(0.5, gt=0, description="of the arranging loss's exponent")
    tau_prior: float = Field(0.5, gt=0, description="temperature of the prior")
    mu: int = Field(1, ge=0, description="a neighbour counts if more than this many of its own lead back to the anchor")


class DSASettings(MethodSettings):
    """DSA. `weights` scales its own two terms; the host's terms are scaled by `host.weights`.

    Source: docs/methods.md#dsa.
    """

    name: str = "dsa"
    variant: Variant = Field(
        "text",
        description="text: the objective that the paper writes; released: the one that the authors' code computes, "
        "which differs from it in every part; its terms have names of their own",
    )
    host: Annotated[SerializeAsAny[MethodSettings], BeforeValidator(method_settings)] = Field(
        description="the method that is regularised, with all its own settings"
    )
    auxiliary: Backbone | None = Field(
        None,
        description="frozen encoder of the same views, e.g. {name: vit_base_patch32_clip_224.openai, pretrained: true} "
        "(the paper's CLIP); or give embeddings",
    )
    embeddings: Input["embeddings"] | list[Input["embeddings"]] | None = Field(
        None,
        description="cached auxiliary features of the whole images, used for both views; with several image sources, "
        "one stage for each; or give auxiliary",
    )
    eta: int = Field(20, ge=1, description="neighbours that an anchor's score is made from; at most all other views")
    alpha: float = Field(1.0, description="pairs with 2 M > alpha attract, the others repel")
    tau: float = Field(1.0, gt=0, description="temperature of L_AM; the paper gives no value")
    tau_prior: float = Field(1.0, gt=0, description="temperature of the prior; the paper gives no value")
    hidden: int | None = Field(None, gt=0, description="width of the arranging network; default: the representation's")
    activation: Literal["exp", "softplus", "relu"] = Field(
        "exp", description="what makes scores positive before rows are normalised (Eq. 9)"
    )
    normalise: bool = Field(True, description="distances between l2-normalised representations; else raw ones")
    distance: Literal["plain", "squared"] = Field("plain", description="in L_AM; plain as Eq. 16 is read")
    m_scale: Literal["row_sum", "row_max"] = Field(
        "row_sum", description="M in L_AM as it is, or divided by its row's maximum"
    )
    anchors: Literal["mutual", "latent", "alike"] = Field(
        "mutual",
        description="an anchor's quality: its mutual neighbours; latent connections too; or all alike (the ablation "
        "without sc)",
    )

    released: ReleasedSettings = Field(ReleasedSettings(), description="variant released: its own options")

    @property
    def builds(self) -> str:  # type: ignore[override]
        """The class of this variant."""
        return BUILDS[self.variant]

    @property
    def terms(self) -> tuple[str, ...]:  # type: ignore[override]
        """The two terms of this variant."""
        return tuple(WEIGHTS[self.variant])

    @model_validator(mode="before")
    @classmethod
    def _weights_of_the_variant(cls, given: Any) -> Any:
        """Fills in the variant's own weights, so that they are part of the fingerprint."""
        if not isinstance(given, dict) or not isinstance(given.get("weights", {}), dict):
            return given
        own = WEIGHTS["released" if given.get("variant") == "released" else "text"]
        return {**given, "weights": {**own, **given.get("weights", {})}}

    @field_validator("host")
    @classmethod
    def _can_be_a_host(cls, host: MethodSettings) -> MethodSettings:
        host.as_host()  # says why where it cannot
        return host

    def as_host(self) -> MethodSettings:
        """Refuses: a regulariser has no representations of its own.

        Raises:
            ValueError: always.
        """
        raise ValueError("dsa cannot regularise itself: name another method")

    @model_validator(mode="after")
    def _one_variant(self) -> DSASettings:
        of_the_text = [name for name in OF_THE_TEXT if getattr(self, name) != type(self).model_fields[name].default]
        if self.variant == "text" and self.released != ReleasedSettings():
            raise ValueError("released: these options are of variant released; remove them, or set variant: released")
        if self.variant == "released" and of_the_text:
            raise ValueError(
                f"{', '.join(of_the_text)}: of variant text, which the release does not have; its own options are "
                "under `released`. Remove them, or set variant: text"
            )
        if self.variant == "released" and not self.host.projects_views:
            raise ValueError(
                f"host: variant released compares the projections of two views, of which {self.host.name} has none; "
                "name simclr, with which it was released, or another method of two views"
            )
        return self

    @model_validator(mode="after")
    def _one_auxiliary(self) -> DSASettings:
        if (self.auxiliary is None) == (self.embeddings is None):
            raise ValueError("auxiliary, embeddings: DSA's prior comes from exactly one of the two; give one")
        return self

    def least_batch(self) -> int:
        """The host's; in the released variant, whose scores are those of whole images, at least 2."""
        return max(self.host.as_host().least_batch(), 2 if self.variant == "released" else 1)

    def over_one_pass(self) -> tuple[str, ...]:
        """What the host does, and the pairs of views, with their neighbours."""
        return (*self.host.over_one_pass(), "the pairs and neighbours that dsa compares")

    def term_weights(self) -> dict[str, float]:
        """The host's terms with the host's weights, then DSA's own two."""
        return {**self.host.term_weights(), **super().term_weights()}

    def queues(self) -> dict[str, QueueSize]:
        """The host's."""
        return {f"host.{name}": queue for name, queue in self.host.as_host().queues().items()}

    def view_sizes(self) -> Iterator[tuple[str, int]]:
        """The host's."""
        yield from ((f"host.{path}", size) for path, size in self.host.as_host().view_sizes())

    def misfits(self, start: Start) -> Iterator[tuple[str, str, str]]:
        """What its host cannot do with the encoder, by itself and as a host."""
        host = self.host.as_host()
        if (reason := host.no_host_with(start)) is not None:
            yield "host", reason, "name a ViT, or another host"
        for path, what, remedy in host.misfits(start):
            yield f"host.{path}", what, remedy
