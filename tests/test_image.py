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
    choose_grid,
    fit_inside,
    open_image,
    tile_image,
    to_rgb,
)

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
PICTURE = (GOLDEN / "images" / "rgb_57x113.png").read_bytes()


def golden_image(name: str) -> Image.Image:
    """The picture as the reference read it: transparency dropped."""
    return Image.open(GOLDEN / "images" / name).convert("RGB")


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


def test_an_opened_file_is_upright(tmp_path):
    image = Image.new("RGB", (40, 20), BLACK)
    image.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter to the right
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert opened.size == (20, 40)
    assert opened.getpixel((10, 5)) == (255, 0, 0)
    assert opened.getpixel((10, 35)) == BLACK


@pytest.mark.parametrize(("mode", "clear"), [("P", 7), ("L", 7), ("RGB", (9, 7, 7))])
def test_a_colour_declared_transparent_becomes_white(mode, clear, tmp_path):
    image = Image.new(mode, (4, 4), clear)
    if mode == "P":
        image.putpalette([0] * 3 * 256)
    image.save(tmp_path / "image.png", transparency=clear)
    assert open_image(tmp_path / "image.png").getpixel((2, 2)) == WHITE


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (90, 0), WHITE),
        ("PA", (7, 0), WHITE),
        ("1", 1, WHITE),
        ("L", 77, (77, 77, 77)),
        ("CMYK", (0, 0, 0, 0), WHITE),
        ("HSV", (0, 0, 128), (128, 128, 128)),
        ("I;16", 257 * 90, (90, 90, 90)),
        ("I", 65535, WHITE),
    ],
)
def test_every_mode_becomes_rgb_on_white(mode, colour, expected):
    assert to_rgb(Image.new(mode, (3, 3), colour)).getpixel((1, 1)) == expected


def test_opaque_rgb_is_left_as_it_is():
    image = golden_image("rgb_57x113.png")
    assert to_rgb(image) is image


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("no picture"), "not a picture"),
        (lambda path: path.write_bytes(PICTURE[:1000]), "damaged or cut short"),
        (lambda path: Image.new("L", (100, 100)).save(path), "too large"),
    ],
)
def test_what_cannot_be_opened_is_named(write, says, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)  # the next to last has 6441
    path = tmp_path / "image.png"
    write(path)
    with pytest.raises(ImageError, match=says) as error:
        open_image(path)
    assert str(path) in str(error.value)
