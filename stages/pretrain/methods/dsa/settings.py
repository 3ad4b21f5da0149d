"""What a config says about `dsa`: a regulariser around any other method. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from pipeline.stage import Input
from stages.models.settings import Backbone
from stages.pretrain.config.method import MethodSettings, QueueSize, method_settings


class DSASettings(MethodSettings):
    """DSA. `weights` scales its own two terms; the host's terms are scaled by `host.weights`.

    Source: docs/methods.md#dsa.
    """

    builds: ClassVar[str] = "stages.pretrain.methods.dsa.method:DSA"
    terms: ClassVar[tuple[str, ...]] = ("dsa_am", "dsa_con")
    default_weights: ClassVar[Mapping[str, float]] = {"dsa_am": 0.1, "dsa_con": 100.0}  # nu and upsilon of Eq. 17

    name: str = "dsa"
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

    @field_validator("host")
    @classmethod
    def _one_layer(cls, host: MethodSettings) -> MethodSettings:
        if isinstance(host, DSASettings):
            raise ValueError("dsa cannot regularise itself: name another method")
        return host

    @model_validator(mode="after")
    def _one_auxiliary(self) -> DSASettings:
        if (self.auxiliary is None) == (self.embeddings is None):
            raise ValueError("auxiliary, embeddings: DSA's prior comes from exactly one of the two; give one")
        return self

    def term_weights(self) -> dict[str, float]:
        """The host's terms with the host's weights, then DSA's own two."""
        return {**self.host.term_weights(), **super().term_weights()}

    def least_batch(self) -> int:
        """The host's: DSA itself compares views, of which one image has two."""
        return self.host.as_host().least_batch()

    def queues(self) -> dict[str, QueueSize]:
        """The host's."""
        return {f"host.{name}": queue for name, queue in self.host.as_host().queues().items()}
