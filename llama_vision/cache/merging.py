"""Merging: a visual token that is not kept lives on in the kept token that is most like it.

Dropping lets the softmax share out what the dropped tokens would have got among those that are
left. Merging does not: the kept token carries the mean feature of its cluster, and the logarithm of
the cluster's size is added to its score, so that it gets the attention of all of them. Where the
members of a cluster are alike, that is exact.

Source: ToMe's proportional attention, arXiv 2210.09461, section 3.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_vision.cache.pruning import Kept
from llama_vision.cache.visual_tokens import VisualTokens

ROWS_AT_ONCE = 2048
"""Tokens that are compared with the kept ones together, which bounds what it takes."""


def directions_of(features: Tensor) -> Tensor:
    """Features [..., D] as float32 of length 1: their products are cosines."""
    return F.normalize(features.float(), dim=-1)


def nearest_kept(visual: VisualTokens, keep: Tensor) -> Tensor:
    """For each token the kept one whose feature points most nearly the same way.

    A token joins one of its own image, for not every row of the text sees the others; where its
    image keeps none, one of any image. Kept tokens stand for themselves.

    Args:
        keep: [V], bool.

    Returns:
        [V], int64, indices into [V].
    """
    return join(visual, keep.nonzero().squeeze(-1), (~keep).nonzero().squeeze(-1))


def join(visual: VisualTokens, kept: Tensor, others: Tensor) -> Tensor:
    """The same for indices: of the kept tokens [n], and of all others [V - n]."""
    stands = torch.arange(len(visual.image), device=kept.device)
    directions = directions_of(visual.features[kept])  # [n, D]
    for some in others.split(ROWS_AT_ONCE):
        cosines = directions_of(visual.features[some]) @ directions.T
        if len(visual.grids) > 1:  # those of other images come after all of its own
            cosines -= 4 * (visual.image[some][:, None] != visual.image[kept])
        stands[some] = kept[cosines.argmax(dim=-1)]
    return stands


def merge(features: Tensor, keep: Tensor, stands: Tensor) -> tuple[Tensor, Tensor]:
    """The kept tokens after merging.

    Args:
        features: [V, D].
        keep: [V], bool, n of them True.
        stands: [V], int64, the kept token that stands for each.

    Returns:
        Mean features of the clusters [n, D], in the features' type; natural logarithms of the
        clusters' sizes [n], float32.
    """
    cluster = keep.cumsum(0)[stands] - 1  # [V], 0 … n - 1
    n, ones = int(keep.sum()), torch.ones(len(keep), device=keep.device)
    sizes = torch.zeros(n, device=keep.device).index_add_(0, cluster, ones)
    cluster, sizes = cluster.to(features.device), sizes.to(features.device)
    total = torch.zeros(n, features.shape[1], device=features.device)
    for start in range(0, len(features), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        total.index_add_(0, cluster[some], features[some].float())
    return total.div_(sizes[:, None]).type_as(features), sizes.log()


class ChosenTokens(NamedTuple):
    """What is left of a group of images once a pruner has answered."""

    index: Tensor
    """[n], int64: which of its tokens are kept."""
    features: Tensor
    """[n, D], those of merged tokens their clusters' means."""
    kept: list[Tensor]
    """Of each image: bool [t, P]."""
    stands: list[Tensor]
    """Of each image int64 [t, P], where tokens were merged; else empty."""
    log_counts: Tensor | None
    """[n], see `VisualContext`; None where nothing was merged."""

    @classmethod
    def of(cls, visual: VisualTokens, answer: Kept) -> "ChosenTokens":
        """Drop or merge what a pruner does not keep."""
        keep, stands = answer
        kept = visual.of_each_image(keep)
        index = keep.nonzero().squeeze(-1).to(visual.features.device)
        if stands is None:
            return cls(index, visual.features[index], kept, [], None)
        features, log_counts = merge(visual.features, keep, stands)
        return cls(index, features, kept, visual.of_each_image(stands), log_counts)

    @property
    def nbytes(self) -> int:
        """Bytes of its features, and of what they stand for."""
        counts = 0 if self.log_counts is None else self.log_counts.nbytes
        return self.features.nbytes + self.index.nbytes + counts

    def to(self, device: torch.device | str) -> "ChosenTokens":
        """The same with its tensors on a device; what it says of each image stays on the host."""
        log_counts = None if self.log_counts is None else self.log_counts.to(device)
        index, features = self.index.to(device), self.features.to(device)
        return self._replace(index=index, features=features, log_counts=log_counts)
