"""Merging: a visual token that is not kept lives on in the kept token that is most like it.

Dropping lets the softmax share out what the dropped tokens would have got among those that are
left. Merging does not: the kept token carries the mean feature of its cluster, and the logarithm of
the cluster's size is added to its score, so that it gets the attention of all of them. Where the
members of a cluster are alike, that is exact.

Source: ToMe's proportional attention, arXiv 2210.09461, section 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS_AT_ONCE = 2048
"""Tokens whose likeness to the kept ones is computed together, which bounds what it takes."""


def nearest_kept(features: Tensor, keep: Tensor, image: Tensor) -> Tensor:
    """For each token the kept one whose feature points most nearly the same way.

    Args:
        features: [V, D].
        keep: [V], bool; kept tokens stand for themselves.
        image: [V], the image that each token belongs to: a token joins one of its own image, for
            not every row sees the others. Where its image keeps none, one of any image.

    Returns:
        [V], int64, indices into [V].
    """
    kept = keep.nonzero().squeeze(-1)
    others = (~keep).nonzero().squeeze(-1)
    stands = torch.arange(len(keep), device=keep.device)
    directions = F.normalize(features[kept].float(), dim=-1)  # [n, D]
    for some in others.split(ROWS_AT_ONCE):
        likeness = F.normalize(features[some].float(), dim=-1) @ directions.T
        if len(image) and bool(image[0] != image[-1]):
            likeness -= 4.0 * (image[some][:, None] != image[kept])  # cosines differ by 2 at most
        stands[some] = kept[likeness.argmax(dim=-1)]
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
    n = int(keep.sum())
    ones = torch.ones(len(keep), device=keep.device)
    sizes = torch.zeros(n, device=keep.device).index_add_(0, cluster, ones)
    cluster, sizes = cluster.to(features.device), sizes.to(features.device)
    total = torch.zeros(n, features.shape[1], device=features.device)
    for start in range(0, len(features), ROWS_AT_ONCE):
        some = slice(start, start + ROWS_AT_ONCE)
        total.index_add_(0, cluster[some], features[some].float())
    return (total / sizes[:, None]).type_as(features), sizes.log()
