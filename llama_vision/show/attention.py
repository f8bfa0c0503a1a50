"""The attention that text pays each visual token, in every cross-attention block, before pruning.

A run computes no probabilities beyond what its pruner is shown, so the prompt goes through the
model once more, with the whole of its pictures.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor, nn

from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import Votes
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.engine.encode import encode_group
from llama_vision.engine.segment_forward import SegmentForward, voting
from llama_vision.engine.segments import Segment, cut_into_segments
from llama_vision.inputs.image import TiledImage
from llama_vision.model.layers import attention_with_saliency, split_heads
from llama_vision.model.model import LlamaVisionModel
from llama_vision.model.text import CrossAttentionBlock, VisualContext


@dataclass
class Seen:
    """One group of images, and the attention that the text of its segment pays them."""

    visual: VisualTokens
    """As a pruner is shown it."""
    saliency: dict[Votes, list[Tensor]]
    """For each way to vote, of each cross-attention block [H, V], float32: probabilities, summed
    over the rows that vote."""
    voters: dict[Votes, int]
    """How many rows those are."""

    def shares(self, votes: Votes) -> Tensor:
        """Of a row's attention, the mean over the rows that vote: [blocks, H, V], each sums to 1.

        Zero where no row votes.
        """
        return torch.stack(self.saliency[votes]).cpu() / max(1, self.voters[votes])


@torch.inference_mode()
def look(
    model: LlamaVisionModel, token_ids: Sequence[int], images: Sequence[TiledImage], chunk: int
) -> list[Seen]:
    """Run a prompt, and watch its cross-attention blocks.

    Args:
        images: one for each `<|image|>` id, in order.
        chunk: most rows that go through a block at once.

    Returns:
        One for each group of images.
    """
    config, seen = model.config.text, []
    sizes = {"slots": 1, "max_text_tokens": len(token_ids), "visual_capacity": None}
    cache = Cache(config, **sizes, dtype=model.dtype, device=model.device)
    for segment in cut_into_segments(token_ids, config.image_token_id):
        group, watched = None, []
        if segment.images:
            group = encode_group(model, [images[i] for i in segment.images], segment.group)
            whole = replace(group)  # the forward gives up its features
        with ExitStack() as watching:
            for block in model.text.layers:
                if group is not None and isinstance(block, CrossAttentionBlock):
                    watched.append(_Watch(segment))
                    hook = block.cross_attn.register_forward_hook(watched[-1])
                    watching.callback(hook.remove)
            SegmentForward(model, cache, 0, segment, group, None, chunk).run(token_ids, False)
        if group is not None:
            seen.append(_seen(whole, watched))
    return seen


class _Watch:
    """A hook on one block's cross-attention, which sees the segment's rows chunk after chunk."""

    def __init__(self, segment: Segment):
        self.segment, self.next = segment, segment.image_rows.start
        self.saliency: dict[Votes, Tensor] = {}
        self.voters = dict.fromkeys(get_args(Votes), 0)
        self.keys: Tensor | None = None

    def __call__(self, attention: nn.Module, args: tuple[Tensor, VisualContext], _: Tensor) -> None:
        x, visual = args
        rows = slice(self.next, self.next + x.shape[1])
        self.next = rows.stop
        self.keys = visual.keys[0].clone()
        q = attention.q_norm(split_heads(attention.q_proj(x), attention.heads))
        for votes in self.voters:
            counted = voting(votes, rows, self.segment)
            _, paid = attention_with_saliency(
                q, visual.keys, visual.values, counted.to(x.device), visual.mask
            )
            self.saliency[votes] = self.saliency[votes] + paid if votes in self.saliency else paid
            self.voters[votes] += int(counted.sum())


def _seen(visual: VisualTokens, watched: list[_Watch]) -> Seen:
    votes, first = get_args(Votes), watched[0]
    saliency = {each: [watch.saliency[each] for watch in watched] for each in votes}
    return Seen(replace(visual, keys=first.keys), saliency, first.voters)
