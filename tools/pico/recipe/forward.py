"""The decoder over many rows at once, each with several groups of pictures, as training runs it.

`engine.prefill` runs one prompt at a time, a segment for each group of images; here the segments
are told apart by a mask, and pictures that several rows show are encoded and projected once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llama_vision.model.layers import rotary_angles, rotary_frequencies
from llama_vision.model.text import (
    CrossAttentionBlock,
    TextContext,
    TextDecoder,
    VisualContext,
)


def hidden_states(
    text: TextDecoder, ids: Tensor, features: Tensor | None = None, shown: Tensor | None = None
) -> Tensor:
    """Hidden states of rows padded on the right; the padding's mean nothing.

    Args:
        ids: [R, S].
        features: [N, t, P, D] of pictures of equally many tiles; None without any.
        shown: [R, n], which of them stand at the `<|image|>` ids of each row.

    Returns:
        [R, S, D].
    """
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    frequencies = rotary_frequencies(text.config, ids.device)
    visual = []
    if features is not None:
        mask = visible_pictures(ids == text.config.image_token_id, shown.shape[1])
        mask = mask.repeat_interleave(features[0].shape[:2].numel(), dim=-1)[:, None]
        sees = mask.any(dim=-1).mT  # [R, S, 1]
        mask = mask | ~sees[:, None]  # attention needs something to look at; `sees` undoes it
        blocks = (block for block in text.layers if isinstance(block, CrossAttentionBlock))
        for block in blocks:
            projected = block.cross_attn.project(features.flatten(1, 2))  # [N, K, t · P, d]
            keys, values = (x[shown].transpose(1, 2).flatten(2, 3) for x in projected)
            visual.append(VisualContext(keys, values, mask=mask, sees=sees))
    return text(ids, TextContext(*rotary_angles(frequencies, positions)), visual)


def visible_pictures(is_image: Tensor, pictures: int) -> Tensor:
    """Which of its n pictures each row of text sees: [R, S, n], from where images stand: [R, S].

    Those of the group that began last, as far as their ids are not yet to come: a row that follows
    the group sees all of it, an image's own row those up to its own, text before any image none.

    Source: llama_models/llama3/chat_format.py, create_vision_mask.
    """
    until_here = is_image.cumsum(dim=1)
    begins = is_image & ~F.pad(is_image, (1, -1))
    first = ((until_here - 1) * begins).cummax(dim=1).values
    picture = torch.arange(pictures, device=is_image.device)
    return (first[..., None] <= picture) & (picture < until_here[..., None])
