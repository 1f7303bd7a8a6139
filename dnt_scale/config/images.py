"""Images: `model.kind: vit`, the shape of a V-DNT or of its ViT baseline, and `data.kind: images`,
the set of images that a run reads.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dnt_scale.config.augment import AnyAugment
from dnt_scale.config.base import ConfigError, Size
from dnt_scale.config.data import SOURCES, DataSection, NamedSet, SetPath
from dnt_scale.config.kinds import resolved
from dnt_scale.config.model import MODELS, BlockSection

Channels = tuple[float, float, float]
Spread = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class ImageRows:
    """What rows of images are: what an image classifier has to fit.

    A batch is a dict: ``image`` uint8 (rows, 3, size, size), ``label`` int64 (rows,), ``IGNORED``
    for a row that only fills the batch up; of training rows also ``target`` fp32 (rows, classes),
    the probabilities that the loss is taken against, where a recipe softens them, and ``key`` int64
    (rows,) in [0, 2^32), from which a model may derive what it draws of a row: a function of seed
    and position.
    """

    folder: Path  # of the set, for messages
    size: int  # pixels a side
    class_names: tuple[str, ...]  # by label


@MODELS.register
class VitConfig(BlockSection):
    """A V-DNT, an image classifier of the same blocks as a DNT's, or its ViT baseline."""

    reads: ClassVar[type] = ImageRows

    kind: Literal["vit"] = "vit"
    image_size: Size = Field(description="pixels a side")
    patch_size: Size = Field(description="pixels a side of a patch, which is a token")
    classes: int = Field(gt=0, le=1 << 20)
    pooling: Literal["token", "mean"] = Field(
        "token", description="what the head sees: a class token, or the mean over the patches"
    )
    stochastic_depth: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of rows that skip the last block's branches in training; less in "
        "earlier blocks",
    )
    pixel_mean: Channels = Field((0.5, 0.5, 0.5), description="of R, G, B in [0, 1]; subtracted")
    pixel_std: tuple[Spread, Spread, Spread] = Field((0.5, 0.5, 0.5), description="divided by")

    @property
    def tokens(self) -> int:
        """Return how many tokens an image has, a class token too."""
        return (self.image_size // self.patch_size) ** 2 + (self.pooling == "token")

    @model_validator(mode="after")
    def _patches_fill_the_image(self) -> Self:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}; "
                "change one of them"
            )
        return self

    def build(self, rows: ImageRows | None = None) -> Any:
        return resolved("dnt_scale.model.vit:VisionTransformer")(self)

    def check(self, rows: ImageRows) -> None:
        if rows.size != self.image_size:
            raise ConfigError(
                f"model.image_size is {self.image_size}, but data.size is {rows.size}; make them "
                "equal"
            )
        if (found := len(rows.class_names)) != self.classes:
            raise ConfigError(
                f"model.classes is {self.classes}, but the set in {rows.folder} has {found} "
                f"classes; set model.classes={found}"
            )

    def describe(self) -> str:
        return (
            f"setting {self.setting}, {self.layers} layers, width {self.width}, {self.heads} "
            f"heads, {self.image_size} pixels in patches of {self.patch_size}, {self.classes:,} "
            "classes"
        )


@SOURCES.register
class ImagesConfig(DataSection):
    """Images with labels, of one set."""

    fixed: ClassVar[tuple[str, ...]] = ("size", "center", "augment")

    kind: Literal["images"] = "images"
    path: SetPath = Field(
        description="the set, made by `dnt data prepare`, or of images by `dnt data images`"
    )
    size: Size = Field(description="pixels a side of what the model sees")
    center: float = Field(
        0.875,
        gt=0,
        le=1,
        description="share of the shorter side that validation sees, from the middle",
    )
    augment: AnyAugment = Field(description="what is done to training images")
    workers: int | None = Field(
        None,
        ge=0,
        le=256,
        description="processes a rank that decode; 0: the rank itself does; null: as many as its "
        "CPUs are for, at most 1 for small images",
    )

    def open(self) -> Any:
        return resolved("dnt_scale.data.images:open_images")(self)

    def at(self, path: Path) -> Self:
        return self.model_validate({**self.model_dump(), "path": path})

    def sets(self) -> list[NamedSet]:
        return [NamedSet("", 1.0, self.path)]
