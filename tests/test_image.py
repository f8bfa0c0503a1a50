import random

import pytest
import torch
from conftest import CASES, GOLDEN, case_images, golden_json, golden_tensors
from PIL import Image

from llama_vision.config import supported_grids
from llama_vision.inputs.image import (
    MEAN,
    STD,
    ImageError,
    TiledImage,
    check_tiles,
    choose_grid,
    fit_inside,
    grid_of,
    tile_image,
)

WHITE = (255, 255, 255)


def golden_image(name: str) -> Image.Image:
    """The picture as the reference read it: transparency dropped, EXIF's turn passed over."""
    image = Image.open(GOLDEN / "images" / name).convert("RGB")
    image.info.clear()
    return image


def levels(pixels: torch.Tensor) -> torch.Tensor:
    """Normalised pixels [..., 3, h, w] back to 0 … 255."""
    mean, std = (torch.tensor(s)[:, None, None] for s in (MEAN, STD))
    return ((pixels * std + mean) * 255).round().int()


@pytest.mark.parametrize("name", sorted(golden_json("images")["full"]))
def test_tiles_are_bit_identical_to_the_reference(name):
    facts = golden_json("images")["full"][name]
    tiled = tile_image(golden_image(name), tile_size=facts["tile_size"], max_tiles=4)
    assert tiled.grid == (facts["tiles_h"], facts["tiles_w"])
    assert tiled.aspect_id == facts["aspect_id"]
    assert tiled.pixels.dtype == torch.float32
    assert torch.equal(tiled.pixels, golden_tensors("images")[name])


@pytest.mark.parametrize("key", sorted(golden_json("images")["sampled"]))
def test_sampled_pixels_of_official_tile_sizes_are_bit_identical(key):
    facts = golden_json("images")["sampled"][key]
    name, size = key.split("@")
    image = golden_image(name)
    tiled = tile_image(image, tile_size=int(size), max_tiles=4)
    assert tiled.grid == (facts["tiles_h"], facts["tiles_w"])
    assert tiled.aspect_id == facts["aspect_id"]
    canvas = (tiled.grid[1] * int(size), tiled.grid[0] * int(size))
    assert list(fit_inside(image.size, canvas, int(size))) == facts["resized_wh"]
    assert torch.equal(tiled.pixels[:, :, 3::61, 5::61], golden_tensors("images")[key])
    means = tiled.pixels.double().mean((1, 2, 3))
    assert torch.allclose(means, torch.tensor(facts["tile_means"]).double(), atol=2e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case != "text_only"])
def test_pixels_of_the_cases_are_bit_identical(case):
    tiled = [image.pixels for sample in case_images(case) for image in sample]
    assert torch.equal(torch.cat(tiled), golden_tensors(f"cases/{case}")["pixel_tiles"])


def test_canvas_table():
    table = golden_json("images")["canvas_table"]
    assert len(table) == 800
    for width, height, tile, *expected in table:
        rows, cols = choose_grid((width, height), tile, 4)
        resized = fit_inside((width, height), (cols * tile, rows * tile), tile)
        clamped = [*expected[:2], *(max(1, side) for side in expected[2:])]
        assert [rows, cols, *resized] == clamped, (width, height, tile)


@pytest.mark.parametrize("size", [(3, 700), (700, 3), (1, 5000), (20000, 20)], ids=str)
def test_a_side_never_vanishes(size):
    tiled = tile_image(Image.new("RGB", size, WHITE), tile_size=56, max_tiles=4)
    assert tiled.grid in {(4, 1), (1, 4)}
    assert int(levels(tiled.pixels).max()) == 255


def test_supported_grids_in_the_order_of_their_ids():
    official = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))
    assert supported_grids(4) == official
    assert supported_grids(2) == ((1, 1), (1, 2), (2, 1))
    assert supported_grids(1) == ((1, 1),)


def test_the_chosen_grid_is_the_best_of_all():
    draw = random.Random(0)
    for _ in range(300):
        width, height = draw.randint(1, 2000), draw.randint(1, 2000)
        tile, most = draw.choice([56, 560]), draw.randint(1, 6)

        def rank(grid, width=width, height=height, tile=tile):
            canvas = torch.tensor([grid[1] * tile, grid[0] * tile])
            scale = (canvas / torch.tensor([width, height])).min().item()
            return (scale < 1, scale if scale >= 1 else -scale, grid[0] * grid[1])

        chosen = choose_grid((width, height), tile, most)
        assert rank(chosen) == min(map(rank, supported_grids(most)))


def test_fewer_tiles_on_request():
    image = golden_image("rgb_300x60.png")
    assert tile_image(image, tile_size=56, max_tiles=4).grid == (1, 4)
    one = tile_image(image, tile_size=56, max_tiles=1)
    assert (one.grid, one.aspect_id, list(one.pixels.shape)) == ((1, 1), 1, [1, 3, 56, 56])


def test_tiles_go_row_by_row_and_padding_is_black_at_the_right_and_bottom():
    image = Image.new("RGB", (110, 110), WHITE)
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    for colour, place in zip(colours, [(56, 0), (0, 56), (56, 56)], strict=True):
        image.paste(Image.new("RGB", (56, 56), colour), place)
    tiled = tile_image(image, tile_size=56, max_tiles=4)
    tiles = levels(tiled.pixels)
    assert tiled.grid == (2, 2)
    assert [tuple(tile[:, 20, 20].tolist()) for tile in tiles] == [WHITE, *colours]
    assert not tiles[1, :, :, 54:].any()
    assert not tiles[2, :, 54:, :].any()
    assert tiles[0].eq(255).all()


def test_no_side_is_enlarged_past_the_tile():
    assert fit_inside((10, 20), (560, 560), 560) == (280, 560)
    assert fit_inside((600, 300), (1120, 560), 560) == (600, 300)


@pytest.mark.parametrize(
    "tiles",
    [
        {"pixels": None},
        {"pixels": [[0.0]]},
        {"pixels": torch.zeros(1, 3, 56, 56, dtype=torch.uint8)},
        {"pixels": torch.zeros(1, 3, 56, 56, device="meta")},
        {"pixels": torch.full((1, 3, 56, 56), float("nan"))},
        {"pixels": torch.zeros(1, 3, 56, 56).to_sparse()},
        {"pixels": torch.zeros(3, 56, 56)},
        {"grid": None},
        {"grid": (1, 1, 1)},
        {"grid": (1.0, 1)},
        {"grid": (True, 1)},
        {"grid": (0, 1)},
        {"grid": (10**400, 1)},
        {"aspect_id": "1"},
        {"aspect_id": 0},
    ],
    ids=str,
)
def test_tiles_of_another_kind_are_refused(tiles):
    good = {"pixels": torch.zeros(1, 3, 56, 56), "grid": (1, 1), "aspect_id": 1}
    check_tiles(TiledImage(**good), 56, 4)
    with pytest.raises(ImageError, match="image"):
        check_tiles(TiledImage(**good | tiles), 56, 4)


def test_what_open_image_takes_can_be_tiled(tmp_path):
    picture = golden_image("rgb_300x60.png")
    want = tile_image(picture, tile_size=56, max_tiles=4)
    picture.save(tmp_path / "image.png")
    for source in (tmp_path / "image.png", (tmp_path / "image.png").read_bytes()):
        assert grid_of(source, 56, 4) == want.grid
        assert torch.equal(tile_image(source, tile_size=56, max_tiles=4).pixels, want.pixels)
