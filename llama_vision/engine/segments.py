"""Which text rows see which images: a prompt is cut into segments that see one group at most."""

from collections.abc import Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """Rows of a prompt that go through the model in one forward.

    A group of images are those whose `<|image|>` ids follow each other directly. The rows of a
    segment before its images see none of them; an image's own row sees the images up to its own;
    all rows after see the whole group.
    """

    rows: range
    """In the prompt."""
    image_rows: range
    """In the segment: those of its group's images; empty where it brings none."""
    images: range
    """Numbers of those images in the prompt."""
    group: int
    """Number of the group in the prompt."""
    is_last: bool
    """Whether no segment of the prompt follows: what it sees, later rows will see."""


def cut_into_segments(
    token_ids: Sequence[int], image_token_id: int, *, continues: bool = False
) -> list[Segment]:
    """Cut before each new group of images but the first.

    Args:
        continues: whether the rows before see images already, so that the first group is new, too:
            text in front of it goes on to see the old one.

    Source: llama_models/llama3/chat_format.py, create_vision_mask; what generated rows see is ours:
    the same as the last row of the prompt.
    """
    groups = image_groups(token_ids, image_token_id)
    cuts = {group.start for group in groups[0 if continues else 1 :]}
    starts = sorted({0, *cuts})
    segments, images = [], 0
    for start, stop in zip(starts, [*starts[1:], len(token_ids)], strict=True):
        here = [group for group in groups if start <= group.start < stop] or [range(start, start)]
        (group,) = here
        count, number = len(group), sum(other.start < start for other in groups)
        image_rows = range(group.start - start, group.stop - start)
        numbers = range(images, images + count)
        is_last = stop == len(token_ids)
        segments.append(Segment(range(start, stop), image_rows, numbers, number, is_last))
        images += count
    return segments


def image_groups(token_ids: Sequence[int], image_token_id: int) -> list[range]:
    """Rows of each group of images: runs of `<|image|>` ids."""
    groups: list[range] = []
    for row, token in enumerate(token_ids):
        if token != image_token_id:
            continue
        if groups and groups[-1].stop == row:
            groups[-1] = range(groups[-1].start, row + 1)
        else:
            groups.append(range(row, row + 1))
    return groups
