"""The store: its size, what it refuses, how a slot is rewound, and how its tokens are trimmed."""

import random
import re

import pytest
import torch
from conftest import (
    CASES,
    Conversation,
    Keep,
    assert_close,
    cache_tensors,
    case_inputs,
    decode,
    live_bytes,
    new_cache,
)
from oracle import MaskedOracle, random_config, random_images

from llama_vision import TrimmedLlama
from llama_vision.cache.kv import Cache, CacheError
from llama_vision.config import official_config
from llama_vision.engine.decode import Decoder

EXACT = 1e-5


# Size


@pytest.mark.parametrize("first", [None, 31], ids=["alike", "first layer larger"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_what_is_allocated(seed, dtype, first):
    sizes = {"slots": 3, "max_text_tokens": 17, "visual_capacity": 23, "dtype": dtype}
    sizes["first_visual_capacity"] = first
    config = random_config(seed).text
    plan, cache = Cache.plan(config, **sizes), Cache(config, **sizes)
    assert plan.total == cache.nbytes == sum(tensor.nbytes for tensor in cache_tensors(cache))
    assert (plan.text, plan.visual) == (cache.text.nbytes, cache.visual.nbytes)
    for tensor in cache_tensors(cache):  # heads are not repeated
        assert tensor.shape == (3, config.num_key_value_heads, tensor.shape[2], config.head_dim)
    layers = len(config.cross_attention_layers)
    assert cache.visual.capacities == [first or 23, *[23] * (layers - 1)]
    assert cache.text.capacities == [17] * config.num_self_attention_layers


def test_one_image_of_four_tiles_in_the_11b_takes_200_mib():
    sizes = {"slots": 1, "max_text_tokens": 1000, "visual_capacity": 4 * 1601}
    plan = Cache.plan(official_config("11b").text, dtype=torch.bfloat16, **sizes)
    assert plan.visual == 2 * 8 * (4 * 1601) * (8 * 128) * 2
    assert round(plan.visual / 2**20) == 200
    assert plan.text == 2 * 32 * 1000 * (8 * 128) * 2


# What it holds


def test_a_slot_s_position_advances_once_a_forward_and_only_its_own(tiny):
    cache = new_cache(tiny.model, 3)
    second, last = (Conversation(tiny.model, cache, slot) for slot in (1, 2))
    second.go_on([1, 2, 3], chunk=2)
    assert cache.text.lengths == [0, 3, 0]
    last.go_on(*case_inputs("two_images")[0])
    rows = len(last.token_ids)
    assert cache.text.lengths == [0, 3, rows]
    decode(Decoder(tiny.model, cache), {second: 5})
    assert cache.text.lengths == [0, 4, rows]
    cache.clear(2)
    assert cache.text.lengths == [0, 4, 0]
    assert last.held == [0, 0]
    ids, images = case_inputs("text_before")[0]  # the next conversation, as if the slot were new
    assert torch.equal(last.go_on(ids, images), Conversation(tiny.model).go_on(ids, images))


def test_only_the_last_group_of_images_is_stored(tiny):
    """Older ones are never read again; room for the last suffices, also from turn to turn."""
    (ids, images), image_id = case_inputs("two_images")[0], tiny.config.text.image_token_id
    tokens = [17 * len(image.pixels) for image in images]
    first, second, third = sorted(images, key=lambda i: len(i.pixels))[::-1] + images[:1]
    assert tokens == [17, 51]
    for turns in (
        [(ids, images, 51), ([7, 8], [], 51)],
        [([image_id, 1, image_id, 2], [first, second], 17), ([5, image_id, 6], [third], 17)],
    ):
        roomy = Conversation(tiny.model)
        tight = Conversation(tiny.model, visual=max(held for *_, held in turns))
        for new, of_turn, held in turns:
            logits = [said.go_on(new, of_turn) for said in (roomy, tight)]
            assert torch.equal(*logits)
            assert roomy.held == tight.held == [held] * 2


# Capacity


def test_a_full_text_store_names_capacity_need_and_flag(tiny):
    conversation = Conversation(tiny.model, text=4)
    conversation.go_on([1, 2, 3])
    says = r"holds 4 tokens and 5 are needed.*--max-seq-len"
    with pytest.raises(CacheError, match=says):
        conversation.go_on([4, 5])
    conversation.go_on([4])
    with pytest.raises(CacheError, match=says):
        Decoder(tiny.model, conversation.cache).step({0: 5})
    assert conversation.cache.text.lengths == [4]


def test_a_full_visual_store_names_capacity_need_and_flag(tiny):
    ids, images = case_inputs("image_first")[0]
    says = r"holds 67 tokens.*68 are needed.*--visual-budget"
    with pytest.raises(CacheError, match=says):
        Conversation(tiny.model, visual=67).go_on(ids, images)
    pruned = Conversation(tiny.model, visual=67)
    pruned.go_on(ids, images, pruner=Keep(torch.arange(68) < 67))
    assert pruned.held == [67, 67]


def test_an_open_store_grows_to_what_is_left_and_loses_nothing_of_other_slots(tiny):
    image_id, images = tiny.config.text.image_token_id, []
    for seed in range(20):  # of one tile, of two, of three, of four
        images += random_images(tiny.config, 1, random.Random(seed))
    sizes = {len(image.pixels): image for image in images}
    cache = new_cache(tiny.model, 2, visual=None)
    assert cache.visual.nbytes == 0
    first, second = (Conversation(tiny.model, cache, slot) for slot in (0, 1))
    first.go_on([image_id, 1], [sizes[3]], pruner=Keep(torch.arange(51) < 20))
    assert cache.visual.capacities == [20, 20]
    for tiles, capacity in ((1, 20), (4, 68), (2, 68)):
        second.go_on([image_id, 1], [sizes[tiles]])
        first.go_on([2])
        assert cache.visual.capacities == [capacity] * 2
        assert second.held == [17 * tiles] * 2
        assert first.held == [20, 20]
    for said in (first, second):
        notes = said.token_ids, said.images, said.kept, said.passes
        expected = MaskedOracle(tiny.model).logits(*notes)
        assert_close("logits", torch.cat(said.logits), expected, EXACT)


# rewind


@pytest.mark.parametrize("pruner", [None, TrimmedLlama(0.2)], ids=["whole", "pruned"])
@pytest.mark.parametrize("case", CASES)
def test_rewinding_then_going_on_gives_the_same_ids(tiny, case, pruner):
    for ids, images in case_inputs(case):
        said = Conversation(tiny.model)
        decoder = Decoder(tiny.model, said.cache)
        answer = [int(said.go_on(ids, images, pruner=pruner)[-1].argmax())]
        expected = []
        for at in (None, 0, 3, 9):
            if expected:
                said.cache.rewind(0, len(ids) + at)
                del answer[at + 1 :]
            while len(answer) < 12:
                decode(decoder, {said: answer[-1]})
                answer.append(int(said.logits[-1].argmax()))
            expected = expected or list(answer)
            assert answer == expected


def test_rewinding_into_a_prompt_then_going_on_equals_a_fresh_run(tiny):
    """Slots to places of their own; one is not rewound."""
    cache, inputs = new_cache(tiny.model, 2), case_inputs("batch")
    slots = [Conversation(tiny.model, cache, slot) for slot in (0, 1)]
    for said, (ids, images) in zip(slots, inputs, strict=True):
        said.go_on(ids, images)
        said.go_on([7])
    at = max(i for i, token in enumerate(inputs[0][0]) if token == 512) + 1
    cache.rewind(0, at)
    assert cache.text.lengths == [at, len(inputs[1][0]) + 1]
    slots[0].go_on(inputs[0][0][at:])
    assert_close("again", slots[0].logits[2], slots[0].logits[0][at:], EXACT)


@pytest.mark.parametrize("pruner", [None, TrimmedLlama(0.2)], ids=["whole", "pruned"])
def test_after_rewinding_to_before_the_first_image_rows_see_none(tiny, pruner):
    """And another image can follow, from which rewinding is counted anew."""
    (image,), image_id = case_inputs("bos_image")[0][1], tiny.config.text.image_token_id
    conversation, fresh = Conversation(tiny.model), Conversation(tiny.model)
    conversation.go_on([1, 2, image_id, 3], [image], pruner=pruner)
    conversation.cache.rewind(0, 2)
    assert conversation.held == [0, 0]
    fresh.go_on([1, 2])
    (other,) = case_inputs("image_first")[0][1]
    for inputs in (([4, 5], []), ([6, image_id, 7], [other]), ([8], [])):
        assert_close("rows", conversation.go_on(*inputs), fresh.go_on(*inputs), EXACT)
    conversation.cache.rewind(0, 4)  # an error, if the first image's row were not forgotten
    assert conversation.cache.text.lengths == [4]


@pytest.fixture
def two_groups(tiny):
    """A conversation whose images are in rows 1 and 4, and 5."""
    image_id, images = (
        tiny.config.text.image_token_id,
        random_images(tiny.config, 3, random.Random(0)),
    )
    conversation = Conversation(tiny.model)
    conversation.go_on([1, image_id, 2], images[:1])
    conversation.go_on([3, image_id, image_id, 4], images[1:])
    return conversation.cache


@pytest.mark.parametrize("position", [2, 3, 4, 5])
def test_rewinding_between_images_is_an_error(two_groups, position):
    says = rf"cannot rewind to {position}: a later image \(row 5\).*6 or more, or at most 1"
    with pytest.raises(CacheError, match=says):
        two_groups.rewind(0, position)
    assert two_groups.text.lengths == [7], "an error must change nothing"
    assert two_groups.visual.holds(0)


@pytest.mark.parametrize("position", [0, 1, 6, 7])
def test_rewinding_outside_the_groups_is_possible(two_groups, position):
    two_groups.rewind(0, position)
    assert two_groups.text.lengths == [position]
    assert two_groups.visual.holds(0) == (position > 1)


@pytest.mark.parametrize("position", [-1, 8])
def test_rewinding_to_rows_that_are_not_there_is_an_error(two_groups, position):
    with pytest.raises(CacheError, match=rf"cannot rewind to {position}; expected 0 to 7"):
        two_groups.rewind(0, position)


# keep


def filled_store(seed, lengths, rows=40):
    """A cache whose slots hold random visual tokens."""
    config = random_config(seed).text
    sizes = {"slots": len(lengths), "max_text_tokens": 1, "visual_capacity": rows}
    cache = Cache(config, dtype=torch.float32, **sizes)
    for layer in range(len(config.cross_attention_layers)):
        for slot, length in enumerate(lengths):
            for room in cache.visual.room(layer, slot, length):
                room.copy_(torch.randn(room.shape))
    return cache


@pytest.mark.parametrize("seed", range(12))
def test_keeping_some_tokens_of_a_slot_equals_a_store_of_them_alone(seed):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    lengths = [draw.randint(1, 40) for _ in range(draw.randint(1, 4))]
    cache, slot = filled_store(seed, lengths), draw.randrange(len(lengths))
    mask = torch.rand(lengths[slot]) < draw.random()
    expected = [tensor.clone() for tensor in cache_tensors(cache)]
    pointers = [tensor.data_ptr() for tensor in cache_tensors(cache)]
    cache.keep(slot, mask)
    kept = lengths[slot] = int(mask.sum())
    assert [tensor.data_ptr() for tensor in cache_tensors(cache)] == pointers
    assert cache.visual.lengths == [lengths] * len(cache.visual.keys)
    for tensor, before in zip(cache_tensors(cache), expected, strict=True):
        if tensor.shape[2] == 40:
            assert torch.equal(tensor[slot, :, :kept], before[slot, :, : len(mask)][:, mask])
        others = [other for other in range(len(lengths)) if other != slot]
        assert torch.equal(tensor[others], before[others])


def test_what_is_kept_later_reads_as_if_it_had_been_pruned_so(tiny):
    """Keeping tokens of a whole cache equals masking them for all rows after."""
    for ids, images in case_inputs("batch_ragged"):
        said = Conversation(tiny.model)
        said.go_on(ids, images)
        tokens = 17 * len(images[-1].pixels)
        assert said.held == [tokens] * 2
        mask = torch.arange(tokens) % 3 == 1
        said.cache.keep(0, mask)
        got = said.go_on([5])
        kept = [*said.kept[:-1], mask.view(-1, 17)]
        oracle = MaskedOracle(tiny.model)
        seen, _ = oracle.masks(said.token_ids, said.images, kept, said.passes)
        features = [oracle.project_slots(image).flatten(0, 1) for image in said.images]
        expected = oracle.run(said.token_ids, features, [seen, seen])
        assert_close("next row", got, expected[-1:], EXACT)


def test_keeping_takes_far_less_room_than_a_second_store():
    cache = filled_store(3, [512] * 4, rows=512)
    assert len(cache.visual.keys) > 1
    mask = torch.arange(512) % 4 != 1
    live = live_bytes(lambda: cache.keep(2, mask))
    assert cache.visual.lengths[0] == [512, 512, 384, 512]
    assert max(live) < cache.visual.nbytes / 8
    assert live[-1] == 0


@pytest.mark.parametrize(
    "mask",
    [torch.ones(6) > 0, torch.ones(1, 7) > 0, torch.ones(7, dtype=torch.uint8), torch.ones(7)],
    ids=["too short", "a batch", "uint8", "float"],
)
def test_keep_needs_a_bool_for_each_token(mask):
    cache = filled_store(0, [7, 3])
    got = re.escape(f"keep-mask is {mask.dtype} {list(mask.shape)}; expected torch.bool [7]")
    with pytest.raises(CacheError, match=got):
        cache.keep(0, mask)
    assert cache.visual.lengths[0] == [7, 3]


def test_a_slot_whose_first_layer_was_left_whole_cannot_be_trimmed_alike(tiny):
    (image,), image_id = case_inputs("bos_image")[0][1], tiny.config.text.image_token_id
    tokens, conversation = len(image.pixels) * 17, Conversation(tiny.model)
    mask = torch.arange(tokens) < 5
    conversation.go_on([image_id, 1], [image], pruner=Keep(mask, trim_first_layer=False))
    assert conversation.held == [tokens, 5]
    with pytest.raises(CacheError, match="first cross-attention layer was left whole"):
        conversation.cache.keep(0, mask)
