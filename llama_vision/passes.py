"""What the blocks of one forward pass share: where its rows stand, and what they can look at."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llama_vision.cache import Cache
from llama_vision.config import TextConfig
from llama_vision.layers import attend, attend_and_weigh, rotary_angles
from llama_vision.pruning import Pruner, check_keep_mask
from llama_vision.visual import (
    Sight,
    Stretch,
    Visibility,
    VisualTokens,
    find_stretches,
    kept_first,
)

Projection = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Visual features [B, V, D] to one layer's keys and values, two of [B, K, V, d]."""


class TextPass:
    """What the self-attention blocks of one pass share: positions, angles, the causal mask."""

    def __init__(self, config: TextConfig, token_ids: Tensor, cache: Cache | None):
        rows = token_ids.shape[1]
        self.store = cache.text if cache is not None else None
        lengths = self.store.lengths if self.store is not None else [0]
        if self.store is not None:
            self.positions = self.store.positions(rows)  # [B, S]
        else:
            self.positions = torch.arange(rows, device=token_ids.device)[None]  # [1, S]
        self.cos, self.sin = rotary_angles(config, self.positions)
        self.causal = max(lengths) == 0
        self.keys_held = max(lengths) + rows
        self.mask = None
        if not self.causal and (rows > 1 or min(lengths) != max(lengths)):
            keys = torch.arange(self.keys_held, device=token_ids.device)
            self.mask = keys <= self.positions[:, None, :, None]  # [B, 1, S, L]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Remember this pass's keys and values [B, K, S, d]; all that its rows may read."""
        if self.store is None:
            return keys, values
        self.store.write(layer, self.positions, keys, values)
        return self.store.read(layer, self.keys_held)


class VisualPass:
    """What the cross-attention blocks of one pass can look at.

    Rows before the first new image of the pass read what the cache remembers of earlier passes,
    the others read the new images; a pass begins a new group of images.
    """

    def __init__(
        self,
        config: TextConfig,
        token_ids: Tensor,
        lengths: Sequence[int],
        visual: VisualTokens | None,
        cache: Cache | None,
        pruner: Pruner | None,
    ):
        self.batch, self.rows = token_ids.shape
        self.row_counts = lengths
        self.device = token_ids.device
        self.layers = len(config.cross_attention_layers)
        self.visual = visual
        self.pruner = pruner if visual is not None else None
        self.saliency: Tensor | None = None
        """[B, H, V], from the first block on until the pruner has answered."""
        self.values: Tensor | None = None
        """[B, K, V, d], of the first block, beside `visual.keys`; likewise."""
        self.store = cache.visual if cache is not None else None
        nothing = [[0] * self.batch] * self.layers
        self.remembered = list(self.store.lengths) if self.store is not None else nothing
        self.blind = visual is None and not any(map(any, self.remembered))
        self.stretches: list[list[Stretch]] = [[] for _ in range(self.batch)]
        if visual is not None:
            ids = token_ids.tolist()
            self.stretches = [find_stretches(row, config.image_token_id) for row in ids]
            if cache is not None:
                cache.visual.note_images(self.stretches, cache.position)
        self._visibility: dict[tuple[int, ...], Visibility] = {}

    def visibility(self, layer: int) -> Visibility:
        """Which row reads which of the tokens that `keys_values` gives."""
        remembered = tuple(self.remembered[layer])
        if remembered not in self._visibility:
            self._visibility[remembered] = self._see(remembered)
        return self._visibility[remembered]

    def _see(self, remembered: Sequence[int]) -> Visibility:
        old = max(remembered)
        sights = []
        for sample, stretches in enumerate(self.stretches):
            first_new = stretches[0].rows.start if stretches else self.rows
            sights.append([])
            if first_new > 0 and remembered[sample]:
                sights[-1].append(Sight(slice(0, first_new), slice(0, remembered[sample])))
            if self.visual is not None:
                sights[-1].extend(s.shifted(old) for s in self.visual.sights(sample, stretches))
        new = max(self.visual.lengths) if self.visual is not None else 0
        return Visibility(sights, (self.batch, self.rows, old + new), self.device)

    def keys_values(self, layer: int, project: Projection) -> tuple[Tensor, Tensor]:
        """Remembered tokens, then those of this pass, which are projected here and only here.

        Returns:
            Two of [B, K, V, d]. What later passes can still read of them is in the cache now,
            unless a pruner is yet to choose among them.
        """
        if self.visual is None:
            return self.store.read(layer, max(self.remembered[layer]))
        new_keys, new_values = project(self.visual.features)
        keys, values = self._behind_remembered(layer, new_keys, new_values)
        if self.pruner is not None:
            self.visual.keys, self.values = new_keys, new_values
        elif self.store is not None:
            self.store.write(layer, keys, values, self.visibility(layer).remembered)
            if layer == self.layers - 1:
                self.visual.release()
        return keys, values

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What each row makes of the tokens it can see: [B, H, S, d].

        While a pruner waits, also notes the attention that the new tokens among k [B, K, V, d] get.
        """
        visibility = self.visibility(layer)
        if self.pruner is None:
            return attend_visible(q, k, v, visibility)
        old = max(self.remembered[layer])
        out = torch.zeros_like(q)
        self.saliency = q.new_zeros(*q.shape[:2], k.shape[2] - old, dtype=torch.float32)
        for sample, sights in enumerate(visibility.sights):
            for rows, tokens in sights:
                heads = q[sample, :, rows], k[sample, :, tokens], v[sample, :, tokens]
                out[sample, :, rows], mass = attend_and_weigh(*heads, self._votes(sample, rows))
                if tokens.start >= old:
                    self.saliency[sample, :, tokens.start - old : tokens.stop - old] += mass
        return out

    def _votes(self, sample: int, rows: slice) -> Tensor:
        """1 for each of the rows whose attention counts, else 0: [rows], float32.

        The rows see the same images, and the first of them is the last image's own.
        """
        end = self.row_counts[sample] - rows.start
        first = {"all": 0, "after": 1, "last": end - 1}[getattr(self.pruner, "votes", "all")]
        row = torch.arange(rows.stop - rows.start, device=self.device)
        return ((row >= first) & (row < end)).float()

    def keep(self, mask: Tensor) -> None:
        """Take the pruner's answer [B, V]: go on with those tokens, and remember only them."""
        layer, whole, pruner = 0, self.visual, self.pruner
        whole.kept = mask = check_keep_mask(mask, pruner, whole)
        keys, values, runs = whole.keys, self.values, self.visibility(layer).remembered
        self.visual = whole.select(mask)
        self.pruner = self.saliency = self.values = None
        self._visibility.clear()
        if self.store is None:
            return
        whole.release()
        if getattr(pruner, "trim_first_layer", True):
            index = kept_first(mask)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            keys, values = keys.gather(2, index), values.gather(2, index)
            runs = self.visibility(layer).remembered
        self.store.write(layer, *self._behind_remembered(layer, keys, values), runs)

    def _behind_remembered(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values, behind those that the cache remembers."""
        old = max(self.remembered[layer])
        if old == 0:
            return keys, values
        old_keys, old_values = self.store.read(layer, old)
        return torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)


def attend_visible(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    """Attention in which each text row reads the run of visual tokens it can see.

    A run is attended to as it is, without a mask: rows that see the same run go together, for the
    whole batch where its samples agree.

    Args:
        q: [B, H, S, d].
        k, v: [B, K, V, d].

    Returns:
        [B, H, S, d]; zero for rows that see nothing.
    """
    if visibility.mask is not None:
        out = attend(q, k, v, mask=visibility.mask)
        return out if visibility.seen is None else out * visibility.seen[:, None]
    out = torch.zeros_like(q)
    for samples, sights in visibility.batches():
        for rows, tokens in sights:
            out[samples, :, rows] = attend(
                q[samples, :, rows], k[samples, :, tokens], v[samples, :, tokens]
            )
    return out
