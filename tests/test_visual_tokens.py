"""Where visual tokens sit in their group of images, and which of them rules can tell apart."""

import random
from itertools import product

import pytest
import torch
from conftest import Conversation, Spy
from oracle import random_images

from llama_vision.cache.visual_tokens import VisualTokens


@pytest.fixture(scope="module")
def tokens() -> VisualTokens:
    """Two images (2 tiles and 1), of 5 tokens a tile."""
    features = torch.arange(3 * 5 * 3.0).view(3, 5, 3)
    return VisualTokens.of_images(features, [(2, 1), (1, 1)], group=1)


def test_tokens_lie_image_after_image(tokens):
    assert torch.equal(tokens.features, torch.arange(45.0).view(15, 3))
    assert tokens.counts == [10, 5]
    assert tokens.image.tolist() == [0] * 10 + [1] * 5
    assert tokens.tile.tolist() == [0] * 5 + [1] * 5 + [0] * 5
    assert tokens.patch.tolist() == [0, 1, 2, 3, 4] * 3
    assert (tokens.group, tokens.patches_per_side, tokens.tokens_per_tile) == (1, 2, 5)


def test_a_mask_is_split_into_one_for_each_image(tokens):
    keep = torch.arange(15) % 4 == 1
    first, second = tokens.of_each_image(keep)
    assert (first.shape, second.shape) == ((2, 5), (1, 5))
    assert torch.equal(torch.cat([first, second]).flatten(), keep)


def test_a_tile_has_its_row_and_column_in_the_image():
    visual = VisualTokens.of_images(torch.zeros(9, 2, 1), [(2, 2), (3, 1), (1, 2)])
    assert visual.tile_row[::2].tolist() == [0, 0, 1, 1, 0, 1, 2, 0, 0]
    assert visual.tile_col[::2].tolist() == [0, 1, 0, 1, 0, 0, 0, 0, 1]


def images_of(config, *grids):
    draw, found = random.Random(0), {}
    while set(grids) - set(found):
        (image,) = random_images(config, 1, draw)
        found[image.grid] = image
    return [found[grid] for grid in grids]


def test_pruners_know_where_each_token_sits(tiny):
    image_id = tiny.config.text.image_token_id
    images, spy = images_of(tiny.config, (1, 3), (2, 1), (2, 2)), Spy()
    Conversation(tiny.model).go_on([image_id, image_id, 3, image_id], images, pruner=spy)
    for number, (visual, of_group) in enumerate(
        zip(spy.visuals, (images[:2], images[2:]), strict=True)
    ):
        places = [
            (image, tile, (row, col) == (-1, -1), row, col)
            for image, tiled in enumerate(of_group)
            for tile in range(len(tiled.pixels))
            for row, col in [(-1, -1), *product(range(4), range(4))]
        ]
        fields = (visual.image, visual.tile, visual.is_class, visual.patch_row, visual.patch_col)
        assert list(zip(*(field.tolist() for field in fields), strict=True)) == places
        assert visual.grids == tuple(image.grid for image in of_group)
        assert visual.group == number


def test_a_spatial_rule_keeps_the_left_half_of_each_image(tiny):
    def left_half(saliency, visual):
        col = visual.tile_col * visual.patches_per_side + visual.patch_col
        widths = torch.tensor([cols for _, cols in visual.grids])[visual.image]
        return ~visual.is_class & (2 * col < widths * visual.patches_per_side)

    image_id = tiny.config.text.image_token_id
    conversation = Conversation(tiny.model)
    images = images_of(tiny.config, (1, 3), (2, 1), (2, 2))
    conversation.go_on([1, image_id, image_id, 3], images[:2], pruner=left_half)
    conversation.go_on([1, image_id, 2], images[2:], pruner=left_half)
    for image, kept in zip(images, conversation.kept, strict=True):
        rows, cols = image.grid
        picture = kept[:, 1:].view(rows, cols, 4, 4).transpose(1, 2).reshape(4 * rows, 4 * cols)
        assert not kept[:, 0].any()
        assert picture[:, : 2 * cols].all()
        assert not picture[:, 2 * cols :].any()
