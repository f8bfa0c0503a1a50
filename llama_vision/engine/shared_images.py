"""Every picture is encoded once for all requests that wait, and longer where there is a cache."""

from collections.abc import Collection, Hashable, Sequence

import torch

from llama_vision.cache.merging import ChosenTokens
from llama_vision.cache.pruning import traits_of
from llama_vision.cache.rule import Rule
from llama_vision.cache.visual_tokens import Grid, VisualTokens
from llama_vision.engine.encode import encode_group
from llama_vision.engine.image_cache import EncodedImage, ImageCache
from llama_vision.engine.request import Checkpoint, Request
from llama_vision.engine.stopwatch import Counts
from llama_vision.inputs.image import tile_image
from llama_vision.values import Instance, check

IMAGE_CACHE = Instance(ImageCache, "an ImageCache, such as ImageCache(2**30), or None")

Key = tuple[bytes, int]
"""A picture's content, and the most tiles that it may be cut into."""


class SharedImages:
    """Encodes the images of requests; for a plan of what it holds see `Workload.shared_tokens`.

    Args:
        checkpoint: whose `image_cache`, if it has one, holds features for longer.
        waiting: the requests that have not been run. What one of them needs is held until then, on
            the host.
        counts: those of the engine.
    """

    def __init__(self, checkpoint: Checkpoint, waiting: Collection[Request], counts: Counts):
        self.model, self.cache = checkpoint.model, checkpoint.image_cache
        self.waiting, self.counts = waiting, counts
        if self.cache is not None:
            check("image_cache", self.cache, IMAGE_CACHE).bind(self.model)
        self.held: dict[Key, EncodedImage] = {}
        self._noted: list[tuple[Hashable, VisualTokens]] = []

    def group(
        self, request: Request, budgets: Sequence[float | int | None], numbers: range, group: int
    ) -> VisualTokens:
        """The visual tokens of a group of a request's images, and what was chosen of it before.

        Args:
            budgets: most of its tokens to keep.
            numbers: of its images among those of the prompt.
            group: its number in the conversation.
        """
        choice = self._choice_key(request, budgets, numbers, group)
        chosen = None if choice is None else self.cache.get(choice)
        if chosen is not None:
            return self._chosen_before(chosen, [request.size.grids[i] for i in numbers], group)
        visual = self._encode(request, numbers, group, keep=choice is None)
        if choice is not None:
            visual.remember = True
            self._noted.append((choice, visual))
        return visual

    def _chosen_before(self, chosen: ChosenTokens, grids: list[Grid], group: int) -> VisualTokens:
        """Every tile, without its features: what is left of them has been chosen."""
        tiles = sum(len(kept) for kept in chosen.kept)
        nothing = torch.empty(1, 1, 1, device=self.model.device)
        nothing = nothing.expand(tiles, self.model.config.vision.tokens_per_tile, 1)
        visual = VisualTokens.of_images(nothing, grids, group=group)
        visual.chosen = chosen.to(self.model.device)
        return visual

    def settle(self) -> None:
        """After a prefill, or when a request has gone: hold what is still needed."""
        for key, visual in self._noted:
            if visual.chosen is not None:
                self.cache.put(key, visual.chosen.to("cpu"))
        self._noted.clear()
        if self.held:
            self.held = {key: entry for key, entry in self.held.items() if self._is_wanted(key)}

    def _choice_key(
        self, request: Request, budgets: Sequence[float | int | None], numbers: range, group: int
    ) -> Hashable | None:
        """Of what a rule chooses that looks at nothing but the group; None where it is no such."""
        rule = request.settings.pruner
        if self.cache is None or not isinstance(rule, Rule) or not traits_of(rule).is_asked_first:
            return None
        try:
            hash(rule)
        except TypeError:  # it counts by a pruner that has none
            return None
        return rule, tuple(budgets), group, tuple(_key(request, i) for i in numbers)

    def _encode(self, request: Request, numbers: range, group: int, keep: bool) -> VisualTokens:
        """Encode those that are nowhere held; `keep` them in the cache too."""
        found = {i: self._find(request, i) for i in numbers}
        missing = [i for i in numbers if found[i] is None]
        if missing:
            side, images = self.model.config.vision.image_size, request.prompt.images
            tiled = [
                tile_image(images[i], tile_size=side, max_tiles=request.tiles) for i in missing
            ]
            made = encode_group(self.model, tiled, group)
            self.counts.images += len(missing)
            for i, entry in zip(missing, _images_of(made), strict=True):
                self._hold(request, i, entry, keep)
                found[i] = entry
            if len(missing) == len(numbers):
                return made
        parts = [found[i].features.to(self.model.device) for i in numbers]
        features = parts[0] if len(parts) == 1 else torch.cat(parts)
        return VisualTokens.of_images(features, [found[i].grid for i in numbers], group=group)

    def _find(self, request: Request, number: int) -> EncodedImage | None:
        if self.held and (entry := self.held.get(_key(request, number))) is not None:
            return entry
        return None if self.cache is None else self.cache.get(_key(request, number))

    def _hold(self, request: Request, number: int, entry: EncodedImage, keep: bool) -> None:
        keep = keep and self.cache is not None
        wanted = bool(self.waiting) and self._is_wanted(_key(request, number))
        if not (keep or wanted):
            return
        features = entry.features.cpu()
        if features.nbytes < features.untyped_storage().nbytes():  # a part of a group's
            features = features.clone()
        key, entry = _key(request, number), EncodedImage(features, entry.grid)
        if wanted:
            self.held[key] = entry
        if keep:
            self.cache.put(key, entry)

    def _is_wanted(self, key: Key) -> bool:
        content, tiles = key
        return any(r.tiles == tiles and content in r.prompt.contents for r in self.waiting)


def _key(request: Request, number: int) -> Key:
    return request.prompt.contents[number], request.tiles


def _images_of(visual: VisualTokens) -> list[EncodedImage]:
    """The parts of a group's features that are those of each image."""
    parts = visual.features.split(visual.counts)
    features = [part.unflatten(0, (-1, visual.tokens_per_tile)) for part in parts]
    return list(map(EncodedImage, features, visual.grids))
