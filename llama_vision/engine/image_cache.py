"""Projected features of pictures, kept in host memory for further questions about them."""

from collections import OrderedDict
from collections.abc import Hashable
from threading import Lock
from typing import NamedTuple
from weakref import ref

from torch import Tensor

from llama_vision.cache.merging import ChosenTokens
from llama_vision.cache.visual_tokens import Grid
from llama_vision.errors import SettingError
from llama_vision.values import Whole, check


class EncodedImage(NamedTuple):
    """One image behind the projector."""

    features: Tensor
    """[t, P, D]."""
    grid: Grid

    @property
    def nbytes(self) -> int:
        """Bytes of its features."""
        return self.features.nbytes


class ImageCache:
    """Features by the content of their pictures, for all engines of one model.

    Where a rule that needs no text has chosen among a group's features, what it left is kept
    instead of them. The least recently used go first.

    Args:
        max_bytes: of all features in it; what is larger is not kept.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = check("max_bytes", max_bytes, Whole(0))
        self.nbytes = 0
        self._model: ref | None = None
        self._entries: OrderedDict[Hashable, tuple[EncodedImage | ChosenTokens, int]] = (
            OrderedDict()
        )
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def bind(self, model: object) -> None:
        """Serve a model from now on.

        Raises:
            SettingError: another one has filled it, whose features mean nothing to this one.
        """
        if self._entries and self._model is not None and self._model() is not model:
            raise SettingError("the image cache is another model's; give each model its own")
        self._model = ref(model)

    def get(self, key: Hashable) -> EncodedImage | ChosenTokens | None:
        """What was put under a key, if it is still there."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Hashable, entry: EncodedImage | ChosenTokens) -> None:
        """Keep features, on the host, and let the least recently used go for them."""
        with self._lock:
            if key in self._entries or entry.nbytes > self.max_bytes:
                return
            self._entries[key] = entry, entry.nbytes
            self.nbytes += entry.nbytes
            while self.nbytes > self.max_bytes:
                _, (_, size) = self._entries.popitem(last=False)
                self.nbytes -= size

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._entries.clear()
            self.nbytes = 0
