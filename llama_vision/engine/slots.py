"""Who has which slot of the cache, and what a conversation goes on from."""

from collections.abc import Collection

from llama_vision.cache.kv import Cache
from llama_vision.engine.request import Checkpoint, Request
from llama_vision.errors import LlamaVisionError
from llama_vision.values import Instance, check


class EngineError(LlamaVisionError):
    """An engine that is closed, or a request that cannot be gone on from."""


class Slots:
    """The slots of a cache.

    Args:
        waiting: the requests that have none yet.
        checkpoint: whose room limits what the cache is enlarged to; None for no limit.
    """

    def __init__(self, cache: Cache, waiting: Collection[Request], checkpoint: Checkpoint | None):
        self.cache, self.waiting, self.checkpoint = cache, waiting, checkpoint
        self.held: dict[int, Request] = {}
        """The latest request of each slot that is taken."""

    @property
    def running(self) -> list[Request]:
        """Those whose answers have not ended, in order of their slots."""
        return [r for _, r in sorted(self.held.items()) if r.finish_reason is None]

    def can_take(self, request: Request) -> bool:
        """Whether there is a slot for it: a free one, or that of its conversation."""
        return request.after is not None or len(self.held) < self.cache.slots

    def check_growth(self, request: Request) -> None:
        """Refuse images for which the cache would be enlarged, where there is no room for that.

        What a pruner will leave of them is not known beforehand.
        """
        store, need = self.cache.visual, request.size.decoded(request.config)
        known = self.checkpoint is not None and request.settings.pruner is None
        if known and not store.fixed and need > max(store.capacities, default=need):
            self.checkpoint.room.check_growth(self.cache, need)

    def take(self, request: Request) -> None:
        """Give it one; raises EngineError where its conversation has gone meanwhile."""
        free = (slot for slot in range(self.cache.slots) if slot not in self.held)
        after = request.after
        if after is not None:
            self.check_ended(after)
        request.rows = [*(self.unread(after) if after else ()), *request.prompt.token_ids]
        request.slot = after.slot if after else next(free)
        request.first_row = self.cache.text.lengths[request.slot]
        self.held[request.slot] = request

    def unread(self, request: Request) -> list[int]:
        """Ids of a held request's answer whose rows are not in the cache: its last, as a rule."""
        fed = self.cache.text.lengths[request.slot] - request.first_row - len(request.rows)
        return request.answer_ids[fed:]

    def give_back(self, request: Request) -> None:
        """Hold nothing of its conversation, if it is the latest of it."""
        if self._is_held(request):
            self.cache.clear(request.slot)
            del self.held[request.slot]
        request.slot = None

    def undo(self, request: Request) -> Request | None:
        """See `Engine.undo`."""
        self.check_ended(request)
        before = request.after
        if before is None:
            self.give_back(request)
            return None
        self.cache.rewind(request.slot, request.first_row)
        self.held[request.slot] = before
        request.slot = None
        return before

    def replace_answer(self, request: Request, token_ids: list[int]) -> None:
        """See `Engine.replace_answer`."""
        self.check_ended(request)
        pairs = enumerate(zip(request.answer_ids, token_ids, strict=False))
        shorter = min(len(request.answer_ids), len(token_ids))
        same = next((place for place, (old, new) in pairs if old != new), shorter)
        held = self.cache.text.lengths[request.slot]
        last = request.first_row + len(request.rows) + same
        self.cache.rewind(request.slot, min(held, last))
        request.replaced = token_ids

    def rows_before(self, after: Request | None) -> int:
        """Rows of a conversation's slot, those of the last answer that were not fed back included;
        for the errors see `check_ended`."""
        if after is None:
            return 0
        self.check_ended(after)
        return self.cache.text.lengths[after.slot] + len(self.unread(after))

    def check_ended(self, request: Request) -> None:
        """Raise EngineError where a request is not the latest of a conversation that is held, or
        has not finished."""
        expected = Instance(Request, "a request that submit gave")
        check("after", request, expected, error=EngineError)
        if not self._is_held(request) or any(other.after is request for other in self.waiting):
            raise EngineError(
                "the conversation is not held any more, or has gone on; submit its first prompts "
                "with hold=True, and go on from the latest request"
            )
        if request.finish_reason is None:
            raise EngineError("the request to go on from has not finished; step until it has")

    def _is_held(self, request: Request) -> bool:
        return request.slot is not None and self.held.get(request.slot) is request
