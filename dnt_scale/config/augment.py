"""`data.augment`: what is done to training images, as a file of configs/augment says."""

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field

from dnt_scale.config import paths
from dnt_scale.config.base import Strict, nearest

Share = Annotated[float, Field(ge=0, le=1)]


class AugmentSection(Strict):
    """A recipe. What is left out is not done."""

    crop: tuple[Share, Share] | None = Field(
        None,
        description="least and greatest share of the image that a random crop takes; null: the "
        "middle, as in validation",
    )
    flip: Share = Field(0.0, description="probability of a mirrored image")
    randaugment: int = Field(
        0, ge=0, le=20, description="operations of RandAugment that are done one after the other"
    )
    magnitude: float = Field(9.0, ge=0, le=10, description="of these, 10 the strongest")
    magnitude_std: float = Field(0.0, ge=0, description="normal noise on it")
    erase: Share = Field(0.0, description="probability that noise covers a random rectangle")
    mixup: float = Field(
        0.0, ge=0, description="alpha of the Beta distribution that two images are mixed by; 0: not"
    )
    cutmix: float = Field(
        0.0,
        ge=0,
        description="the same where a rectangle of one is put into the other; with mixup, each in "
        "half of the cases",
    )
    smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of the target that is spread over all classes"
    )


def folder() -> Path:
    """Return where the recipes lie: packed into an installed package, beside it in a checkout."""
    packed = Path(__file__).parents[1] / "configs"
    return (packed if packed.is_dir() else Path(__file__).parents[2] / "configs") / "augment"


def _read(raw: Any) -> Any:
    """Return the mapping in the file that a text names: a choice, or a path. Raises ValueError."""
    if not isinstance(raw, str):
        return raw
    names = sorted(path.stem for path in folder().glob("*.yaml"))
    path = folder() / f"{raw}.yaml" if raw in names else Path(paths.expanded(raw))
    if not path.is_file():
        close = nearest(raw, names, 0.5)
        hint = f"; did you mean {close}?" if close else "."
        raise ValueError(f"no such recipe{hint} There are: {', '.join(names)}, or a YAML file")
    try:
        return yaml.safe_load(path.read_text("utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: not readable as YAML ({error})") from None


AnyAugment = Annotated[AugmentSection, BeforeValidator(_read)]
