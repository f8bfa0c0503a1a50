"""Prefill: in whatever pieces the rows, images and keys go through, the logits are the same."""

import random
import weakref
from itertools import pairwise

import pytest
import torch
from conftest import Conversation, assert_close, case_inputs, random_pruner
from oracle import random_config, random_images, random_model

from llama_vision import KeyNorm, LastQuery, RandomTokens, TopK, TrimmedLlama
from llama_vision.cache.visual_tokens import VisualTokens
from llama_vision.engine.segment_forward import row_chunks

EXACT = 1e-5
PRUNERS = {
    "none": None,
    "all rows": TrimmedLlama(0.2),
    "after": TrimmedLlama(0.2, votes="after", trim_first_layer=False),
    "last": LastQuery(0.4),
    "by another": TopK(TrimmedLlama(0.1)),
    "keys": KeyNorm(0.3),
    "random": RandomTokens(0.5, seed=3),
}


@pytest.mark.parametrize(
    ("rows", "most", "ends"),
    [
        (range(10), 100, [10]),
        (range(10), 4, [4, 8, 10]),
        (range(3, 8), 2, [5, 7, 8]),
        (range(2, 5), 1, [3, 4, 5]),
        (range(4, 4), 3, []),
    ],
)
def test_rows_go_in_runs_of_at_most_so_many(rows, most, ends):
    chunks = row_chunks(rows, most)
    assert [chunk.stop for chunk in chunks] == ends
    assert [chunk.start for chunk in chunks] == [rows.start, *ends[:-1]][: len(ends)]


@pytest.mark.parametrize("held", [0, 70_000])
def test_no_mask_of_a_long_prompt_is_large(held):
    chunks = row_chunks(range(131072 - held), 2048, held)
    assert chunks[-1].stop == 131072 - held
    assert all(a.stop == b.start for a, b in pairwise(chunks))
    entries = [(chunk.stop - chunk.start) * (held + chunk.stop) for chunk in chunks]
    assert chunks[0].start == 0
    assert max(entries) <= 2**25 < 2048 * 131072


@pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS)
@pytest.mark.parametrize("seed", range(3))
def test_keys_in_pieces_and_masks_in_pieces_change_no_logit(seed, pruner, monkeypatch):
    config = random_config(seed)
    model, answers = random_model(config, seed), []
    for tokens, entries in ((8192, 2**25), (5, 30)):
        monkeypatch.setattr("llama_vision.engine.segment_forward.TOKENS_AT_ONCE", tokens)
        monkeypatch.setattr("llama_vision.engine.segment_forward.MASK_ENTRIES", entries)
        draw, conversation = random.Random(seed), Conversation(model)
        for _ in range(3):
            conversation.go_on(*conversation.random_turn(draw), pruner=pruner)
        answers.append(torch.cat(conversation.logits))
    assert_close("pieces", answers[1], answers[0], EXACT)


@pytest.mark.parametrize("case", ["image_first", "text_before", "two_images", "consecutive"])
def test_two_passes_equal_one_wherever_the_text_is_cut(tiny, case):
    """A second pass goes on with the images of the first, or brings a group of its own."""
    ((ids, images),), image_id = case_inputs(case), tiny.config.text.image_token_id
    expected = Conversation(tiny.model).go_on(ids, images)
    inside = [i for i in range(1, len(ids)) if ids[i - 1] == ids[i] == image_id]
    cuts = [at for at in range(1, len(ids)) if at not in inside]  # a group is never cut
    for places in [cuts, *([at] for at in cuts)]:
        conversation, left = Conversation(tiny.model), iter(images)
        for start, stop in pairwise([0, *places, len(ids)]):
            new = [next(left) for _ in range(ids[start:stop].count(image_id))]
            conversation.go_on(ids[start:stop], new)
        assert_close(f"cut at {places}", torch.cat(conversation.logits), expected, EXACT)


@pytest.mark.parametrize("pruner", PRUNERS.values(), ids=PRUNERS)
@pytest.mark.parametrize("seed", range(6))
def test_one_prompt_equals_its_groups_in_turns(seed, pruner):
    """Where each turn begins with its group, the same rows vote: the same tokens are kept."""
    draw, config = random.Random(seed), random_config(seed)
    model, image_id = random_model(config, seed), config.text.image_token_id
    turns = []
    for count in (draw.randint(0, 1), draw.randint(1, 2), draw.randint(1, 3)):
        text = [draw.randrange(config.text.vocab_size) for _ in range(draw.randint(1, 5))]
        turns.append(([image_id] * count + text, random_images(config, count, draw)))
    at_once, in_turns = Conversation(model), Conversation(model)
    ids, images = ([part for turn in turns for part in turn[i]] for i in (0, 1))
    at_once.go_on(ids, images, pruner=pruner)
    for turn in turns:
        in_turns.go_on(*turn, pruner=pruner)
    assert_close("logits", torch.cat(in_turns.logits), at_once.logits[0], EXACT)
    assert all(map(torch.equal, in_turns.kept, at_once.kept))
    assert in_turns.held == at_once.held
    assert len(in_turns.kept) == len(images)
    if pruner is not None:
        assert not all(kept.all() for kept in at_once.kept)


def test_images_are_taken_when_their_group_is_encoded(tiny):
    (ids, images), events = case_inputs("two_images")[0], []

    def taken():
        for image in images:
            events.append("image")
            yield image

    block = tiny.model.text.layers[0]
    hook = block.register_forward_hook(lambda *_: events.append("segment"))
    Conversation(tiny.model).go_on(ids, taken())
    hook.remove()
    assert events == ["image", "segment", "image", "segment"]


@pytest.mark.parametrize("pruned", [False, True])
def test_features_are_freed_as_soon_as_nothing_reads_them(tiny, monkeypatch, pruned):
    """Once the last block has its keys and values; those of all tokens once a pruner has chosen."""
    references, alive, lay_out = [], [], VisualTokens.of_images

    def lay_out_and_watch(features, *args, **kwargs):
        visual = lay_out(features, *args, **kwargs)
        references.append(weakref.ref(visual.features))
        return visual

    monkeypatch.setattr(VisualTokens, "of_images", lay_out_and_watch)
    first, last = (tiny.model.text.layers[i] for i in tiny.config.text.cross_attention_layers)
    watched = [first.mlp, last.cross_attn.v_proj, last.cross_attn.o_proj]
    hooks = [
        module.register_forward_pre_hook(lambda *_: alive.append(references[0]() is not None))
        for module in watched
    ]
    image = random_images(tiny.config, 1, random.Random(0))
    pruner = random_pruner(random.Random(0)) if pruned else None
    Conversation(tiny.model).go_on([tiny.config.text.image_token_id, 1], image, pruner=pruner)
    for hook in hooks:
        hook.remove()
    assert alive == [True, not pruned, False]
