"""What the blocks of one forward pass share: where its rows stand, and what they can look at."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llama_vision.cache.kv import Cache
from llama_vision.cache.pruning import Pruner, check_keep_mask
from llama_vision.cache.visual_tokens import (
    TOKENS_AT_ONCE,
    Sight,
    Stretch,
    Visibility,
    VisualTokens,
    find_stretches,
    kept_first,
)
from llama_vision.config import TextConfig
from llama_vision.model.layers import attend, attend_and_weigh, rotary_angles, rotary_frequencies

Projection = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Visual features [B, V, D] to one layer's keys and values, two of [B, K, V, d]."""


MASK_ENTRIES = 2**25
"""Most rows times keys of a causal mask: near 131,072 tokens, chunks are of 256 rows at most."""


def row_chunks(batch: int, rows: int, most: int | None, held: int | None = None) -> list[slice]:
    """The rows of a pass in runs; `most` rows of all samples together, or all if that is None.

    Args:
        held: rows that the cache holds already, where every chunk needs a mask over those too.
    """
    if most is None:
        return [slice(0, rows)]
    chunks, start, size = [], 0, max(1, most // batch)
    while start < rows:
        if held is not None:
            size = max(1, min(size, MASK_ENTRIES // (batch * (held + start + size))))
        chunks.append(slice(start, min(start + size, rows)))
        start += size
    return chunks


def in_chunks(x: Tensor, chunks: Sequence[slice], run: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """`run` over the rows of x [B, S, D], chunk after chunk: [B, S, D].

    A block needs several times the room of its input; chunks are written back over theirs, so that
    a long prompt takes little more than the input itself.
    """
    if len(chunks) == 1:
        return run(x, chunks[0])
    for rows in chunks:
        x[:, rows] = run(x[:, rows], rows)
    return x


class TextPass:
    """What the self-attention blocks of one pass share.

    Args:
        h: [B, S, D], the rows.
        prefill_chunk: most rows, of all samples together, that go through a block at once. Later
            chunks read the earlier ones' keys and values from the cache; without one, all rows go
            together.
    """

    def __init__(
        self,
        config: TextConfig,
        h: Tensor,
        cache: Cache | None,
        prefill_chunk: int | None = None,
    ):
        rows = h.shape[1]
        self.config = config
        self.store = cache.text if cache is not None else None
        if self.store is not None:
            self.lengths = self.store.lengths
            self.positions = self.store.positions(rows)  # [B, S]
        else:
            self.lengths = [0]
            self.positions = torch.arange(rows, device=h.device)[None]  # [1, S]
        most = prefill_chunk if cache is not None else None
        self.chunks = row_chunks(h.shape[0], rows, most, held=max(self.lengths))
        self._last: TextChunk | None = None

    def chunk(self, rows: slice) -> "TextChunk":
        """What these rows need. The last answer is kept, all of them would be large."""
        if self._last is None or self._last.rows != rows:
            self._last = TextChunk(self, rows)
        return self._last


class TextChunk:
    """Rows of a pass that go through a block together: positions, angles, the causal mask."""

    def __init__(self, text: TextPass, rows: slice):
        self.rows, self.store = rows, text.store
        self.positions = text.positions[:, rows]
        frequencies = rotary_frequencies(text.config, self.positions.device)
        self.cos, self.sin = rotary_angles(frequencies, self.positions)
        self.keys_held = max(text.lengths) + rows.stop
        self.causal = self.keys_held == rows.stop - rows.start
        uniform = min(text.lengths) == max(text.lengths)
        self.mask = None
        if not self.causal and (rows.stop - rows.start > 1 or not uniform):
            keys = torch.arange(self.keys_held, device=self.positions.device)
            positions = self.positions[:1] if uniform else self.positions
            self.mask = keys <= positions[:, None, :, None]  # [B or 1, 1, c, L]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Remember the rows' keys and values [B, K, c, d]; all that they may read."""
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
        prefill_chunk: int | None = None,
        device: torch.device | str = "cpu",
    ):
        self.batch, self.rows = token_ids.shape
        self.device = device
        self.layers = len(config.cross_attention_layers)
        self.visual = visual
        self.pruner = pruner if visual is not None else None
        self.saliency: Tensor | None = None
        """[B, H, V], from the first block on until the pruner has answered."""
        self.values: Tensor | None = None
        """[B, K, V, d], of the first block, beside `visual.keys`; likewise."""
        self.store = cache.visual if cache is not None else None
        self.chunks = row_chunks(
            self.batch, self.rows, prefill_chunk if cache is not None else None
        )
        nothing = [[0] * self.batch] * self.layers
        self.remembered = list(self.store.lengths) if self.store is not None else nothing
        self.blind = visual is None and not any(map(any, self.remembered))
        self.stretches: list[list[Stretch]] = [[] for _ in range(self.batch)]
        self._visibility: dict[tuple[int, ...], Visibility] = {}
        if visual is None:
            return
        ids = token_ids.tolist()
        self.stretches = [find_stretches(row, config.image_token_id) for row in ids]
        if self.pruner is not None:
            is_image = token_ids == config.image_token_id
            votes = count_votes(getattr(pruner, "votes", "all"), is_image, lengths)
            self.votes = votes.to(device)
        if cache is not None:
            cache.visual.note_images(self.stretches, cache.position)

    def chunk(self, layer: int, rows: slice) -> "VisualChunk":
        """What these rows need in one layer."""
        key = (rows.start, *self.remembered[layer])
        if key not in self._visibility:
            sights = [
                [sight.within(rows) for sight in sample if sight.overlaps(rows)]
                for sample in self.sights(layer)
            ]
            new = max(self.visual.lengths) if self.visual is not None else 0
            shape = (self.batch, rows.stop - rows.start, max(self.remembered[layer]) + new)
            self._visibility[key] = Visibility(sights, shape, self.device)
        return VisualChunk(self, layer, rows, self._visibility[key])

    def sights(self, layer: int) -> list[list[Sight]]:
        """For each sample which rows of the pass read which of the tokens of `keys_values`."""
        remembered = self.remembered[layer]
        old = max(remembered)
        sights = []
        for sample, stretches in enumerate(self.stretches):
            first_new = stretches[0].rows.start if stretches else self.rows
            sights.append([])
            if first_new > 0 and remembered[sample]:
                sights[-1].append(Sight(slice(0, first_new), slice(0, remembered[sample])))
            if self.visual is not None:
                sights[-1].extend(s.shifted(old) for s in self.visual.sights(sample, stretches))
        return sights

    def read_later(self, layer: int) -> list[slice]:
        """The run of those tokens, of each sample, that rows after this pass can still read."""
        return [row[-1].tokens if row else slice(0, 0) for row in self.sights(layer)]

    def keys_values(self, layer: int, project: Projection) -> tuple[Tensor, Tensor]:
        """Remembered tokens, then those of this pass, which are projected here and only here.

        Returns:
            Two of [B, K, V, d]. What later passes can still read of them is in the cache now,
            unless a pruner is yet to choose among them.
        """
        if self.visual is None:
            return self.store.read(layer, max(self.remembered[layer]))
        new_keys, new_values = self._project(project)
        keys, values = self._behind_remembered(layer, new_keys, new_values)
        if self.pruner is not None:
            self.visual.keys, self.values = new_keys, new_values
        elif self.store is not None:
            self.store.write(layer, keys, values, self.read_later(layer))
            if layer == self.layers - 1:
                self.visual.release()
        return keys, values

    def _project(self, project: Projection) -> tuple[Tensor, Tensor]:
        """Keys and values of all new tokens; piece by piece where they are many."""
        features = self.visual.features
        batch, tokens, _ = features.shape
        if self.store is None or batch * tokens <= TOKENS_AT_ONCE:
            return project(features)
        keys = values = None
        for sample in range(batch):
            for run in row_chunks(1, tokens, TOKENS_AT_ONCE):
                piece = project(features[sample : sample + 1, run])
                if keys is None:
                    _, heads, _, width = piece[0].shape
                    keys = features.new_empty(batch, heads, tokens, width)
                    values = torch.empty_like(keys)
                keys[sample, :, run], values[sample, :, run] = piece[0][0], piece[1][0]
        return keys, values

    def keep(self, mask: Tensor) -> None:
        """Take the pruner's answer [B, V]: go on with those tokens, and remember only them."""
        layer, whole, pruner = 0, self.visual, self.pruner
        whole.kept = mask = check_keep_mask(mask, pruner, whole)
        keys, values, runs = whole.keys, self.values, self.read_later(layer)
        self.visual = whole.select(mask)
        self.pruner = self.saliency = self.values = self.votes = None
        self._visibility.clear()
        if self.store is None:
            return
        whole.release()
        if getattr(pruner, "trim_first_layer", True):
            index = kept_first(mask)[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
            keys, values = keys.gather(2, index), values.gather(2, index)
            runs = self.read_later(layer)
        self.store.write(layer, *self._behind_remembered(layer, keys, values), runs)

    def _behind_remembered(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values, behind those that the cache remembers."""
        old = max(self.remembered[layer])
        if old == 0:
            return keys, values
        old_keys, old_values = self.store.read(layer, old)
        return torch.cat([old_keys, keys], dim=2), torch.cat([old_values, values], dim=2)


class VisualChunk:
    """Rows of a pass that go through a cross-attention block together."""

    def __init__(self, sight: VisualPass, layer: int, rows: slice, visibility: Visibility):
        self.sight, self.layer, self.rows, self.visibility = sight, layer, rows, visibility

    @property
    def seen(self) -> Tensor | None:
        """[B, c, 1], False where a row sees nothing; None where every row sees something."""
        return self.visibility.seen

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What each row [B, H, c, d] makes of the tokens it can see: [B, H, c, d].

        While a pruner waits, also notes the attention that the new tokens among k [B, K, V, d] get.
        """
        sight = self.sight
        if sight.pruner is None:
            return attend_visible(q, k, v, self.visibility)
        old = max(sight.remembered[self.layer])
        out = torch.zeros_like(q)
        if sight.saliency is None:
            shape = (*q.shape[:2], k.shape[2] - old)
            sight.saliency = q.new_zeros(shape, dtype=torch.float32)
        votes = sight.votes[:, self.rows]
        for samples, sights in self.visibility.batches():
            for rows, tokens in sights:
                seen = q[samples, :, rows], k[samples, :, tokens], v[samples, :, tokens]
                out[samples, :, rows], mass = attend_and_weigh(*seen, votes[samples, rows])
                if tokens.start >= old:
                    new = slice(tokens.start - old, tokens.stop - old)
                    sight.saliency[samples, :, new] += mass
        return out


def count_votes(votes: str, is_image: Tensor, lengths: Sequence[int]) -> Tensor:
    """1 for each row whose attention counts in the saliency, else 0: [B, S], float32.

    Args:
        votes: see `pruning.Rule`.
        is_image: [B, S], where the `<|image|>` ids are.
        lengths: rows of each sample that are not padding.
    """
    row = torch.arange(is_image.shape[1], device=is_image.device)
    end = torch.tensor(list(lengths), device=is_image.device)[:, None]
    if votes == "last":
        return (row == end - 1).float()
    counted = row < end
    return (counted & ~is_image if votes == "after" else counted).float()


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
