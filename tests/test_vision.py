import copy
import dataclasses
import math

import pytest
import torch
from conftest import CASES, TINY, assert_close, case_images, golden_json, golden_tensors
from oracle import full_attention

from llama_vision.checkpoint.config_json import read_config
from llama_vision.engine.encode import encode_group
from llama_vision.model.layers import merge_heads, split_heads
from llama_vision.model.vision import Layout, VisionEncoder, real_tokens_first

TOLERANCE = 1e-4
VISION = read_config(TINY).vision
SLOTS = 24  # 17 tokens a tile, padded to a multiple of 8
WITH_IMAGES = [case for case in CASES if case != "text_only"]


def golden(name: str) -> torch.Tensor:
    return golden_tensors("modules")[name]


GRID = tuple(golden("vision.aspect_hw").flatten().tolist())
TILES = GRID[0] * GRID[1]
REAL = TILES * VISION.tokens_per_tile
ORDER = real_tokens_first(
    TILES, VISION.tokens_per_tile, VISION.max_num_tiles, SLOTS, torch.device("cpu")
)
LAYOUT = Layout(REAL, SLOTS, copies=0)
ASPECT_ID = torch.tensor([VISION.aspect_id(GRID)])


@pytest.fixture(scope="module")
def vision(tiny):
    return tiny.model.vision


MODULES = {
    "patch_embed": lambda v, x: v.patch_embedding(x).flatten(2).transpose(1, 2),
    "pre_tile": lambda v, x: v.pre_tile_positional_embedding(x, ASPECT_ID),
    "position_embed": lambda v, x: v.gated_positional_embedding(x, ASPECT_ID),
    "ln_pre": lambda v, x: v.layernorm_pre(x),
    "ln_post": lambda v, x: v.layernorm_post(x),
}


@pytest.mark.parametrize("name", MODULES)
def test_module(vision, name):
    out = MODULES[name](vision, golden(f"{name}.in"))
    assert_close(name, out, golden(f"{name}.out"), TOLERANCE)


@pytest.mark.parametrize(
    ("name", "stack"),
    [("vision_local_layer", "transformer"), ("vision_global_layer", "global_transformer")],
)
def test_blocks(vision, name, stack):
    """The reference lays tokens out tile by tile; ours has the real ones in front."""
    index = golden_json("manifest")["module_layers"][name]
    block = vision.get_submodule(f"{stack}.layers.{index}")
    out = block(golden(f"{name}.in")[:, ORDER], LAYOUT)
    assert_close(name, out, golden(f"{name}.out")[:, ORDER], TOLERANCE)


def test_embedding_of_tiles_after_the_local_blocks(vision):
    x, expected = (golden(f"post_tile.{side}").flatten(1, 2)[:, ORDER] for side in ("in", "out"))
    out = vision.post_tile_positional_embedding(x, ASPECT_ID, ORDER // SLOTS)
    assert_close("post_tile", out, expected, TOLERANCE)


def test_encoder(vision):
    out = vision(golden("vision_encoder.in")[0, :, :TILES], ASPECT_ID)
    assert_close("vision_encoder", out, golden("vision_encoder.out")[0, :, :TILES], TOLERANCE)


def test_projector(tiny):
    out = tiny.model.projector(golden("vision_projector.in"))
    assert_close("vision_projector", out, golden("vision_projector.out"), TOLERANCE)


def test_exactly_pairs_of_padding_tokens_are_blocked():
    """Real tokens in front and padding after them say the same as the reference's mask."""
    blocked = golden("vision.pair_blocked")[ORDER][:, ORDER]
    assert blocked[REAL:, REAL:].all()
    assert blocked.sum() == (len(ORDER) - REAL) ** 2


def test_attention_without_a_mask_equals_attention_under_the_reference_s_mask(vision):
    torch.manual_seed(0)
    x = torch.randn(2, len(ORDER), VISION.hidden_size)
    attention = vision.transformer.layers[0].self_attn
    q, k, v = (
        split_heads(project(x), attention.heads)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    allowed = ~golden("vision.pair_blocked")
    masked = [full_attention(*sample, allowed) for sample in zip(q, k, v, strict=True)]
    expected = attention.o_proj(merge_heads(torch.stack(masked)))[:, ORDER]
    assert_close("attention", attention(x[:, ORDER], LAYOUT), expected, 1e-5)


@pytest.mark.parametrize(("tiles", "tokens"), [(1, 5), (3, 5), (4, 5), (4, 8), (1, 1)])
def test_real_tokens_come_first_and_keep_their_order(tiles, tokens):
    order = real_tokens_first(tiles, tokens, 4, 8, torch.device("cpu")).tolist()
    real = [tile * 8 + token for tile in range(tiles) for token in range(tokens)]
    assert order[: len(real)] == real
    assert sorted(order) == list(range(32))


@pytest.mark.parametrize("case", WITH_IMAGES)
def test_features_of_every_image_and_projected_as_one_group(case, tiny):
    tensors = golden_tensors(f"cases/{case}")
    images = [image for of_prompt in case_images(case) for image in of_prompt]
    features = [
        tiny.model.vision(image.pixels[None], torch.tensor([VISION.aspect_id(image.grid)]))[0]
        for image in images
    ]
    assert_close(case, torch.cat(features), tensors["vision_features"], TOLERANCE)
    projected = encode_group(tiny.model, images).features
    assert_close(case, projected, tensors["projected"].flatten(0, 1), TOLERANCE)


def test_images_of_one_size_are_encoded_as_each_alone(vision):
    torch.manual_seed(0)
    pixels, ids = torch.randn(3, 2, 3, 56, 56), torch.tensor([2, 5, 2])
    together = vision(pixels, ids)
    for i in range(3):
        alone = vision(pixels[i : i + 1], ids[i : i + 1])
        assert_close(f"image {i}", together[i : i + 1], alone, 1e-5)


@pytest.mark.parametrize("grid", VISION.grids)
def test_one_padding_tile_stands_for_all_of_them(vision, grid, monkeypatch):
    """The golden features are made so; here against the encoder that computes every one."""
    torch.manual_seed(0)
    pixels = torch.randn(2, math.prod(grid), 3, VISION.image_size, VISION.image_size)
    ids = torch.tensor([VISION.aspect_id(grid)] * 2)
    assert vision.padding_tiles_alike
    rows = []
    vision.transformer.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    stand_in = vision(pixels, ids)
    monkeypatch.setattr(vision, "padding_tiles_alike", False)
    assert_close("features", stand_in, vision(pixels, ids), 1e-5)
    assert rows == [min(math.prod(grid) + 1, 4) * SLOTS, 4 * SLOTS]


@pytest.mark.parametrize(
    "table",
    [
        "pre_tile_positional_embedding.embedding",
        "gated_positional_embedding.tile_embedding",
        "post_tile_positional_embedding.embedding",
    ],
)
def test_padding_tiles_that_differ_are_all_computed(vision, table):
    """Somebody may have trained the tables' unused entries."""
    encoder = copy.deepcopy(vision)
    weight = encoder.get_submodule(table).weight
    pixels, id = torch.randn(1, 1, 3, 56, 56), VISION.aspect_id((1, 1))
    slot = weight[id].unflatten(0, (4, -1))[2]  # the second of three padding tiles
    slot.copy_(torch.randn_like(slot))
    encoder.compare_padding_tiles()
    assert not encoder.padding_tiles_alike
    differs = encoder(pixels, torch.tensor([id])) - vision(pixels, torch.tensor([id]))
    assert differs.abs().max() > 1e-3


def test_intermediate_features_are_inputs_of_their_blocks():
    """Those of block 0 are what enters it; features of several blocks are interleaved."""
    torch.manual_seed(0)
    config = dataclasses.replace(VISION, intermediate_layers_indices=(0, 2))
    encoder = VisionEncoder(config).eval().requires_grad_(False)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    entered = {}
    for index in (0, 2):
        encoder.transformer.layers[index].register_forward_pre_hook(
            lambda _, args, index=index: entered.update({index: args[0].clone()})
        )
    out = encoder(torch.randn(1, 2, 3, 56, 56), torch.tensor([2])).flatten(1, 2)
    assert out.shape[-1] == 3 * config.hidden_size
    assert torch.equal(out[..., config.hidden_size :: 2], entered[0][:, :REAL])
    assert torch.equal(out[..., config.hidden_size + 1 :: 2], entered[2][:, :REAL])
