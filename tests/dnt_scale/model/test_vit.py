"""V-DNT against transformers' ViT, and what it does not share with the language model."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from dnt_scale import config
from dnt_scale.config import ConfigError, ImageRows, Setting, VitConfig
from dnt_scale.model.batch import IGNORED
from dnt_scale.model.block import SETTINGS
from dnt_scale.model.flops import count_parameters
from dnt_scale.model.init import init_weights
from dnt_scale.model.task import flops_per_row, shapes_of
from dnt_scale.model.vit import VisionTransformer, patches, uniform
from tests.helpers.models import normal

IMAGES = ["data=images", "data.path=/set", "run.name=any"]


def small(**changes: object) -> VitConfig:
    fields = {
        "name": "small",
        "layers": 3,
        "width": 24,
        "heads": 3,
        "image_size": 12,
        "patch_size": 4,
        "classes": 7,
        "setting": "S4",
    }
    return VitConfig.model_validate(fields | changes)


def preset(name: str) -> VitConfig:
    found = config.load([f"model={name}", *IMAGES]).model
    assert isinstance(found, VitConfig)
    return found


@torch.no_grad()
def busy(section: VitConfig) -> VisionTransformer:
    """A model with weights large enough that no part is nearly linear or nearly silent."""
    model = VisionTransformer(section)
    init_weights(model, 0)
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        value = normal(parameter.shape, seed, torch.float32)
        if name.endswith(".gain"):
            value = 1 + 0.5 * torch.tanh(value)
        elif name.endswith(".weight"):
            value = value * (1.0 if "emb" in name else 1.5 / math.sqrt(parameter.shape[1]))
        parameter.copy_(value)
    return model


def pictures(section: VitConfig, rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 3, section.image_size, section.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


# ---------------------------------------------------------------- transformers' ViT


def as_ours(theirs: ViTForImageClassification) -> Iterator[tuple[str, Tensor]]:
    """Their tensors by our names: a convolution's weight is a matrix, as each patch is a row."""
    read = theirs.get_parameter
    yield "patch.weight", read("vit.embeddings.patch_embeddings.projection.weight").flatten(1)
    yield "patch.bias", read("vit.embeddings.patch_embeddings.projection.bias")
    yield "cls", read("vit.embeddings.cls_token").flatten()
    yield "pos_emb.weight", read("vit.embeddings.position_embeddings")[0]
    names = {"norm_out": "vit.layernorm", "head": "classifier"}
    inside = {f"attn.w_{letter}": f"attention.{letter}_proj" for letter in "qkvo"}
    inside |= {"ffn.w_1": "mlp.fc1", "ffn.w_2": "mlp.fc2"}
    inside |= {"norm_pre1": "layernorm_before", "norm_pre2": "layernorm_after"}
    for layer in range(theirs.config.num_hidden_layers):
        names |= {f"blocks.{layer}.{a}": f"vit.layers.{layer}.{b}" for a, b in inside.items()}
    for ours, other in names.items():
        yield f"{ours}.{'gain' if 'norm' in ours else 'weight'}", read(f"{other}.weight")
        yield f"{ours}.bias", read(f"{other}.bias")


@torch.no_grad()
def test_s1_with_layernorm_is_transformers_vit() -> None:
    section = small(
        setting="S1", norm="layernorm", bias=True, norm_eps=1e-6, width=32, heads=4, image_size=32
    )
    with torch.random.fork_rng():  # its constructor draws from the global generator
        theirs = ViTForImageClassification(
            ViTConfig(
                hidden_size=section.width,
                num_hidden_layers=section.layers,
                num_attention_heads=section.heads,
                intermediate_size=4 * section.width,
                layer_norm_eps=section.norm_eps,
                image_size=section.image_size,
                patch_size=section.patch_size,
                num_labels=section.classes,
            )
        ).eval()
    for seed, (name, parameter) in enumerate(theirs.named_parameters()):
        noise = normal(parameter.shape, seed, torch.float32)
        parameter.copy_(
            1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise
        )
    ours = VisionTransformer(section)
    ours.init_buffers()
    weights = dict(ours.named_parameters())
    for name, value in as_ours(theirs):
        weights.pop(name).copy_(value)
    assert not weights

    images = pictures(section, 5)
    expected = theirs(pixel_values=(images.float() / 255 - 0.5) / 0.5).logits
    assert expected.std() > 1  # not a comparison of zeros
    torch.testing.assert_close(ours(images), expected, atol=1e-4, rtol=0)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("name", "millions"),
    [("s16", 22.05), ("b16", 86.57), ("l16", 304.33), ("h14", 632.05)],  # timm's counts
)
def test_the_twins_have_the_sizes_of_vit(name: str, millions: float) -> None:
    assert count_parameters(preset(f"vit_{name}")) / 1e6 == pytest.approx(millions, abs=0.01)
    # without biases, with gains; 307M and 632M are the paper's for L and H
    assert count_parameters(preset(f"vdnt_{name}")) / 1e6 == pytest.approx(millions, rel=5e-3)
    assert preset(f"vdnt_{name}").setting == "S5" and preset(f"vit_{name}").setting == "S1"


def test_tiny_ones_share_their_shape() -> None:
    ours, theirs = preset("vdnt_tiny"), preset("vit_tiny")
    assert (ours.layers, ours.width, ours.tokens) == (theirs.layers, theirs.width, theirs.tokens)
    assert 2.6e6 < count_parameters(ours) < 2.8e6


def test_the_flops_are_those_of_every_matrix_product() -> None:
    section = small(layers=2, width=8, heads=2, patch_size=6, pooling="token")
    tokens, patch, d = 5, 4, 8
    products = patch * 3 * 36 * d + section.classes * d  # of weights outside of blocks
    products += 2 * tokens * (4 * d * d + 2 * 4 * d * d)
    attention = 2 * 2 * tokens * tokens * d  # logits and values, in 2 layers
    assert flops_per_row(section, 1) == 3 * 2 * (products + attention)


# ---------------------------------------------------------------- what stands where


def test_patches_are_those_of_a_convolution() -> None:
    images, weight = normal((2, 3, 12, 12), 0), normal((5, 3, 4, 4), 1)
    expected = F.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches(images, 4) @ weight.flatten(1).T, expected)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_places_norms_as_in_the_language_model(setting: Setting) -> None:
    names = set(shapes_of(small(setting=setting)))
    language = config.load(
        ["model=dnt_nano", f"model.setting={setting}", "data.path=/set", "run.name=any"]
    ).model
    norms = {name for name in shapes_of(language) if "norm" in name and "blocks.0" in name}
    assert {name for name in names if "norm" in name and "blocks.0" in name} == norms
    assert ("norm_in.gain" in names) == SETTINGS[setting].input


@torch.no_grad()
def test_every_token_attends_to_all() -> None:
    model = busy(small(layers=1, pooling="mean"))
    x = normal((1, 9, 24), 0, torch.float32)
    changed = x.clone()
    changed[0, -1] += 1
    difference = (model.blocks[0](changed) - model.blocks[0](x)).abs().amax(-1)
    assert (difference > 1e-3).all()


@torch.no_grad()
def test_pooling_takes_a_class_token_or_the_mean() -> None:
    shapes = shapes_of(small(pooling="mean"))
    assert "cls" not in shapes and shapes["pos_emb.weight"] == (9, 24)
    assert shapes_of(small())["pos_emb.weight"] == (10, 24)
    images = pictures(small(), 2)
    assert busy(small(pooling="mean"))(images).shape == (2, 7)


# ---------------------------------------------------------------- stochastic depth


def test_uniform_numbers_are_spread_and_unlike() -> None:
    keys = torch.arange(20_000)
    one, other = uniform(keys, 0), uniform(keys, 1)
    assert one.min() >= 0 and one.max() < 1
    for values in (one, other):
        counts = torch.histc(values, 10, 0, 1)
        assert (counts - 2000).abs().max() < 200  # 4.7 standard deviations
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([one[1:], one[:-1]]))[0, 1]) < 0.03
    assert uniform(torch.tensor([2**32 - 1, 0]), 95).tolist() == pytest.approx(
        uniform(torch.tensor([2**32 - 1, 0]), 95).tolist(), abs=0
    )


@torch.no_grad()
def test_a_row_skips_branches_by_its_key_alone() -> None:
    model = busy(small(stochastic_depth=0.6))
    images, keys = pictures(model.config, 6), torch.arange(6) * 977
    whole = model(images, keys)
    assert (whole - model(images)).abs().max() > 0.1
    parts = torch.cat([model(images[rows], keys[rows]) for rows in (slice(2), slice(2, 6))])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    kept = model._kept(torch.arange(4000), torch.float32)
    assert kept[0] is None
    for drop, each in zip((0.3, 0.6), kept[1:], strict=True):
        assert each.unique().tolist() == pytest.approx([0.0, 1 / (1 - drop)])
        assert each.mean(0).tolist() == pytest.approx([1, 1], abs=0.08)


# ---------------------------------------------------------------- losses


@torch.no_grad()
def test_the_loss_takes_labels_or_soft_targets() -> None:
    model = busy(small())
    images, label = pictures(model.config, 4), torch.tensor([1, 3, IGNORED, 6])
    logits = model(images).double()
    logs = logits.log_softmax(1)
    hard = {"image": images, "label": label}
    assert float(model.loss_sum(hard)) == pytest.approx(
        -float(logs[0, 1] + logs[1, 3] + logs[3, 6]), abs=1e-4
    )
    assert int(model.count(hard)) == 3
    target = torch.rand(4, 7, generator=torch.Generator().manual_seed(0))
    target /= target.sum(1, keepdim=True)
    soft = hard | {"label": torch.tensor([1, 3, 0, 6]), "target": target}
    assert float(model.loss_sum(soft)) == pytest.approx(-float((target * logs).sum()), abs=1e-4)
    found = model.eval_sums(hard)
    order = logits.argsort(1, descending=True)
    ranks = [order[row].tolist().index(int(label[row])) for row in (0, 1, 3)]
    assert int(found["top1"]) == sum(rank == 0 for rank in ranks)
    assert int(found["top5"]) == sum(rank < 5 for rank in ranks)
    assert float(found["loss"]) == float(model.loss_sum(hard))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.patch_size=5", r"model: .*image_size 28 is not divisible by patch_size 5"),
        ("model.heads=5", r"model: .*width 192 is not divisible by heads 5"),
        ("data.augment=diet", r"no such recipe; did you mean deit\? There are: deit, none, simple"),
        ("data.augment.mixpu=1", r"mixpu"),
    ],
)
def test_what_does_not_go_together_is_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(["model=vdnt_tiny", *IMAGES, override])
    assert "\n" not in str(caught.value)


def test_a_set_of_other_images_is_refused() -> None:
    rows = ImageRows(Path("/set"), 12, tuple("abcdefg"))
    small().check(rows)
    with pytest.raises(ConfigError, match=r"model\.image_size is 16, but data\.size is 12"):
        small(image_size=16).check(rows)
    with pytest.raises(ConfigError, match=r"model\.classes is 8, but the set in /set has 7"):
        small(classes=8).check(rows)
