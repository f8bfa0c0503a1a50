"""Which rows see which images, and where a prompt is cut for that."""

import random

import pytest
import torch
from conftest import CASES, golden_json, golden_tensors
from oracle import visible_images

from llama_vision.engine.segments import cut_into_segments, image_groups

IMAGE = 99


def images_seen(token_ids, image_id):
    """The images that each row sees, according to its segment."""
    seen = []
    for segment in cut_into_segments(token_ids, image_id):
        assert segment.rows.start == len(seen), "every row is in one segment"
        for row in range(len(segment.rows)):
            behind = row - segment.image_rows.start + 1
            count = min(max(behind, 0), len(segment.images))
            seen.append(set(segment.images[:count]))
    assert len(seen) == len(token_ids)
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
        expected = [set(row.any(-1).nonzero().flatten().tolist()) for row in sees[:length]]
        assert images_seen(ids[:length].tolist(), image_id) == expected


def test_random_texts_are_seen_as_when_walking_along_them():
    draw = random.Random(0)
    for _ in range(300):
        ids = [IMAGE if draw.random() < 0.3 else 1 for _ in range(draw.randint(1, 14))]
        assert images_seen(ids, IMAGE) == visible_images(ids, IMAGE), ids


@pytest.mark.parametrize(
    ("ids", "continues", "starts"),
    [
        ([1, 2], False, [0]),
        ([1, 2], True, [0]),
        ([1, IMAGE, IMAGE, 1, IMAGE, 1], False, [0, 4]),
        ([1, IMAGE, IMAGE, 1, IMAGE, 1], True, [0, 1, 4]),
        ([IMAGE, 1, IMAGE], False, [0, 2]),
        ([IMAGE, 1, IMAGE], True, [0, 2]),
    ],
)
def test_a_text_is_cut_before_each_new_group(ids, continues, starts):
    """The first is new, too, where the rows before see an older one."""
    segments = cut_into_segments(ids, IMAGE, continues=continues)
    assert [segment.rows.start for segment in segments] == starts
    groups = [range(s.rows[r.start], s.rows[r.start] + len(r)) for s in segments if (r := s[1])]
    assert groups == image_groups(ids, IMAGE)
    assert [image for segment in segments for image in segment.images] == [*range(ids.count(IMAGE))]
    for segment in segments:
        assert len(segment.image_rows) == len(segment.images)
