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
    starts = [group.start for group in groups]
    if groups and (starts[0] == 0 or not continues):
        starts[0] = 0
    else:  # rows without images of their own come first
        groups, starts = [range(0), *groups], [0, *starts]
    segments, images, number = [], 0, 0
    for group, start, stop in zip(groups, starts, [*starts[1:], len(token_ids)], strict=True):
        first = group.start - start if group else 0
        segment = Segment(
            range(start, stop),
            image_rows=range(first, first + len(group)),
            images=range(images, images + len(group)),
            group=number,
            is_last=stop == len(token_ids),
        )
        segments.append(segment)
        images, number = images + len(group), number + bool(group)
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
