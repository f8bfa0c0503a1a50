import random

import pytest
import torch
from conftest import CASES, golden_json, golden_tensors
from oracle import visible_images

from llama_vision.cache.visual_tokens import Sight, Stretch, VisualTokens, find_stretches

IMAGE = 99


def images_seen(token_ids, image_id):
    """The images that each row sees, according to its stretch."""
    seen = [set() for _ in token_ids]
    for stretch in find_stretches(token_ids, image_id):
        for row in range(len(token_ids))[stretch.rows]:
            assert not seen[row], "a row is in two stretches"
            seen[row] = set(range(stretch.images.start, stretch.images.stop))
    return seen


@pytest.mark.parametrize(
    "case", golden_json("tokenizer")["vision_ranges"], ids=lambda case: str(case["tokens"])
)
def test_ranges_are_the_reference_s(case):
    expected = [set() for _ in case["tokens"]]
    for image, (start, end) in enumerate(case["ranges"]):
        for row in range(start, len(expected) if end == -1 else end):
            expected[row].add(image)
    assert images_seen(case["tokens"], 128011) == expected


@pytest.mark.parametrize("case", CASES)
def test_rows_see_the_tiles_that_they_see_in_the_reference(case):
    tensors = golden_tensors(f"cases/{case}")
    image_id = golden_json("manifest")["ids"]["image"]
    no_tile = torch.zeros(*tensors["tokens"].shape, 1, 1, dtype=torch.bool)
    sees_tile = tensors.get("text_sees_tile", no_tile)
    for ids, length, sees in zip(tensors["tokens"], tensors["lengths"], sees_tile, strict=True):
        token_ids = ids[:length].tolist()
        expected = [set(row.any(-1).nonzero().flatten().tolist()) for row in sees[:length]]
        assert images_seen(token_ids, image_id) == expected


def test_random_texts_are_seen_as_when_walking_along_them():
    draw = random.Random(0)
    for _ in range(300):
        ids = [IMAGE if draw.random() < 0.3 else 1 for _ in range(draw.randint(1, 14))]
        assert images_seen(ids, IMAGE) == visible_images(ids, IMAGE), ids


def test_stretches_of_two_groups():
    assert find_stretches([1, IMAGE, IMAGE, 1, IMAGE, 1], IMAGE) == [
        Stretch(slice(1, 2), slice(0, 1)),
        Stretch(slice(2, 4), slice(0, 2)),
        Stretch(slice(4, 6), slice(2, 3)),
    ]


@pytest.fixture(scope="module")
def tokens() -> VisualTokens:
    """Three samples: two images (2 tiles and 1), none, and one of 1 tile; 5 tokens a tile."""
    torch.manual_seed(0)
    return VisualTokens.of_images(
        [[torch.randn(2, 5, 3), torch.randn(1, 5, 3)], [], [IMAGE_3]],
        [[(2, 1), (1, 1)], [], [(1, 1)]],
    )


IMAGE_3 = torch.full((1, 5, 3), 7.0)


def test_visual_tokens_lie_image_after_image(tokens):
    assert tokens.features.shape == (3, 15, 3)
    assert tokens.lengths == [15, 0, 5]
    assert tokens.counts == [[10, 5], [], [5]]
    assert torch.equal(tokens.features[2, :5], IMAGE_3[0])


def test_visual_tokens_know_their_places(tokens):
    assert tokens.image[0].tolist() == [0] * 10 + [1] * 5
    assert tokens.tile[0].tolist() == [0] * 5 + [1] * 5 + [0] * 5
    assert tokens.patch[0].tolist() == [0, 1, 2, 3, 4] * 3
    assert tokens.image[2].tolist() == [0] * 5 + [-1] * 10


def test_padding_is_not_valid(tokens):
    assert tokens.valid.sum(1).tolist() == [15, 0, 5]
    assert torch.equal(tokens.valid, tokens.tile >= 0)
    assert torch.equal(tokens.valid, tokens.patch >= 0)


def test_stretches_become_runs_of_tokens(tokens):
    stretches = [Stretch(slice(1, 3), slice(0, 1)), Stretch(slice(3, 6), slice(0, 2))]
    assert tokens.sights(0, stretches) == [
        Sight(slice(1, 3), slice(0, 10)),
        Sight(slice(3, 6), slice(0, 15)),
    ]
    assert tokens.sights(1, []) == []
    assert Sight(slice(1, 3), slice(0, 10)).shifted(4) == Sight(slice(1, 3), slice(4, 14))


def test_a_tile_has_its_row_and_column_in_the_image():
    features = [[torch.zeros(4, 2, 1), torch.zeros(3, 2, 1)], [torch.zeros(2, 2, 1)]]
    visual = VisualTokens.of_images(features, [[(2, 2), (3, 1)], [(1, 2)]])
    rows = [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 2, 2]
    cols = [0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert visual.tile_row.tolist() == [rows, [0] * 4 + [-1] * 10]
    assert visual.tile_col.tolist() == [cols, [0, 0, 1, 1] + [-1] * 10]
