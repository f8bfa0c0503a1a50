import random

import pytest
import torch
from conftest import (
    assert_close,
    case_images,
    case_prompts,
    golden_json,
    new_cache,
    run_batch,
)
from oracle import random_config, random_images, random_model, random_token_ids

from llama_vision.cache.kv import Cache, CacheError
from llama_vision.config import official_config

TOLERANCE = 1e-5


def stores(cache):
    both = (cache.text, cache.visual)
    return [tensor for store in both for tensor in (*store.keys, *store.values)]


def whole(model, ids, images):
    """Logits of one sample run alone, in one pass, without a cache."""
    return run_batch(model, [ids], [images])[0]


def split_images(image_id, ids, at, images):
    """The images of the two parts of a text that is cut at a row."""
    first = ids[:at].count(image_id)
    return images[:first], images[first:]


# Size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_the_plan_is_what_is_allocated(seed, dtype):
    sizes = {"batch": 3, "max_text_tokens": 17, "visual_capacity": 23, "dtype": dtype}
    config = random_config(seed).text
    plan, cache = Cache.plan(config, **sizes), Cache(config, **sizes)
    assert plan.total == cache.nbytes == sum(store.nbytes for store in stores(cache))
    assert (plan.text, plan.visual) == (cache.text.nbytes, cache.visual.nbytes)


def test_one_image_of_four_tiles_in_the_11b_takes_200_mib():
    sizes = {"batch": 1, "max_text_tokens": 1000, "visual_capacity": 4 * 1601}
    plan = Cache.plan(official_config("11b").text, dtype=torch.bfloat16, **sizes)
    assert plan.visual == 2 * 8 * (4 * 1601) * (8 * 128) * 2
    assert round(plan.visual / 2**20) == 200
    assert plan.text == 2 * 32 * 1000 * (8 * 128) * 2


def test_heads_are_not_repeated(tiny):
    cache, text = new_cache(tiny.model, 2, text=5, images=1), tiny.config.text
    assert len(cache.text.keys) == text.num_self_attention_layers
    assert len(cache.visual.keys) == len(text.cross_attention_layers)
    for store in stores(cache):
        assert store.shape[:2] == (2, text.num_key_value_heads)
        assert store.shape[3] == text.head_dim


# What it holds


def test_the_position_advances_once_a_pass_by_the_real_rows(tiny):
    cache = new_cache(tiny.model, 2)
    assert cache.position == [0, 0]
    run_batch(tiny.model, [[1, 2, 3], [4]], [[], []], cache)
    assert cache.position == [3, 1]
    run_batch(tiny.model, [[5], [6]], [[], []], cache)
    assert cache.position == [4, 2]


def test_nothing_is_allocated_again(tiny):
    cache = new_cache(tiny.model, 1)
    pointers = [store.data_ptr() for store in stores(cache)]
    ids, images = list(case_prompts("two_images")[0].token_ids), case_images("two_images")
    run_batch(tiny.model, [ids], images, cache)
    run_batch(tiny.model, [[7]], [[]], cache)
    assert [store.data_ptr() for store in stores(cache)] == pointers


def test_only_the_last_group_of_images_is_remembered(tiny):
    """Older groups are never read again; a cache for the last one suffices."""
    ids, (images,) = list(case_prompts("two_images")[0].token_ids), case_images("two_images")
    tokens = len(images[-1].pixels) * tiny.config.vision.tokens_per_tile
    roomy = new_cache(tiny.model, 1)
    tight = Cache(
        tiny.config.text,
        batch=1,
        max_text_tokens=64,
        visual_capacity=tokens,
        dtype=torch.float32,
    )
    for cache in (roomy, tight):
        run_batch(tiny.model, [ids], [images], cache)
        assert cache.visual.lengths == [[tokens]] * len(cache.visual.keys)
    after = [run_batch(tiny.model, [[7, 8]], [[]], cache)[0] for cache in (roomy, tight)]
    assert torch.equal(*after)
    assert_close("continued", after[0], whole(tiny.model, [*ids, 7, 8], images)[-2:], TOLERANCE)


# Capacity


def test_a_full_text_store_names_capacity_need_and_flag(tiny):
    cache = new_cache(tiny.model, 1, text=4)
    run_batch(tiny.model, [[1, 2, 3]], [[]], cache)
    with pytest.raises(CacheError, match=r"holds 4 tokens and 5 are needed.*--max-seq-len"):
        run_batch(tiny.model, [[4, 5]], [[]], cache)
    run_batch(tiny.model, [[4]], [[]], cache)
    assert cache.position == [4]


def test_a_full_visual_store_names_capacity_need_and_flag(tiny):
    ids, (images,) = list(case_prompts("image_first")[0].token_ids), case_images("image_first")
    need = len(images[0].pixels) * tiny.config.vision.tokens_per_tile
    cache = Cache(
        tiny.config.text,
        batch=1,
        max_text_tokens=64,
        visual_capacity=need - 1,
        dtype=torch.float32,
    )
    says = rf"holds {need - 1} tokens.*{need} are needed.*--visual-budget"
    with pytest.raises(CacheError, match=says):
        run_batch(tiny.model, [ids], [images], cache)


# Going on from a prefix


@pytest.mark.parametrize("case", ["image_first", "text_before", "two_images", "consecutive"])
def test_two_passes_equal_one_wherever_the_text_is_cut(tiny, case):
    """A second pass goes on with the images of the first, or brings a group of its own."""
    ids, (images,) = list(case_prompts(case)[0].token_ids), case_images(case)
    image_id = tiny.config.text.image_token_id
    expected = whole(tiny.model, ids, images)
    for at in range(1, len(ids)):
        if ids[at - 1] == ids[at] == image_id:
            continue  # a group is never cut
        cache = new_cache(tiny.model, 1)
        parts = zip((ids[:at], ids[at:]), split_images(image_id, ids, at, images), strict=True)
        logits = [run_batch(tiny.model, [part], [new], cache)[0] for part, new in parts]
        assert_close(f"cut at {at}", torch.cat(logits), expected, TOLERANCE)


def test_row_by_row_equals_one_pass(tiny):
    """Two samples whose images come at different rows."""
    ids, (images,) = list(case_prompts("two_images")[0].token_ids), case_images("two_images")
    batch = [ids, [7, 8, *ids[:-2]]]
    cache, rest, rows = new_cache(tiny.model, 2), [list(images), list(images)], []
    for tokens in zip(*batch, strict=True):
        new = [
            [left.pop(0)] if token == tiny.config.text.image_token_id else []
            for token, left in zip(tokens, rest, strict=True)
        ]
        rows.append(run_batch(tiny.model, [[token] for token in tokens], new, cache))
    for sample in range(2):
        got = torch.cat([row[sample] for row in rows])
        assert_close(f"sample {sample}", got, whole(tiny.model, batch[sample], images), TOLERANCE)


def test_a_second_turn_with_a_new_image_equals_the_whole_conversation(tiny):
    """Turns of different lengths in one batch; some bring images, one never sees any."""
    image_id = tiny.config.text.image_token_id
    a, b, c = (sample[0] for sample in map(case_images, ("image_first", "bos_image", "two_images")))
    turns = [
        ([[1, image_id, 2, 3, 4], [5, 6], [image_id, 7, 8]], [a[:1], [], b[:1]]),
        ([[9, image_id, 10], [11, 12, image_id, image_id, 13], [14]], [c[:1], [*a, *c[1:]], []]),
        ([[15], [16, 17], [18, image_id, 19]], [[], [], c[:1]]),
        ([[20, 21], [image_id], [22]], [[], b[:1], []]),
    ]
    cache = new_cache(tiny.model, 3)
    logits = [run_batch(tiny.model, ids, images, cache) for ids, images in turns]
    for sample in range(3):
        ids = [token for turn, _ in turns for token in turn[sample]]
        images = [image for _, turn in turns for image in turn[sample]]
        assert cache.position[sample] == len(ids)
        assert_close(
            f"sample {sample}",
            torch.cat([turn[sample] for turn in logits]),
            whole(tiny.model, ids, images),
            TOLERANCE,
        )


def test_text_before_a_first_image_of_a_later_turn_sees_nothing(tiny):
    """Also where another sample of the batch has had its image from the start."""
    (image,), image_id = case_images("bos_image")[0], tiny.config.text.image_token_id
    cache = new_cache(tiny.model, 2)
    first = run_batch(tiny.model, [[1, 2], [image_id, 3]], [[], [image]], cache)
    second = run_batch(tiny.model, [[4, image_id, 5], [6, 7]], [[image], []], cache)
    expected = whole(tiny.model, [1, 2, 4, image_id, 5], [image])
    assert_close("late image", torch.cat([first[0], second[0]]), expected, TOLERANCE)
    expected = whole(tiny.model, [image_id, 3, 6, 7], [image])
    assert_close("early image", torch.cat([first[1], second[1]]), expected, TOLERANCE)


# Batches


def test_a_batch_of_all_cases_equals_each_alone(tiny):
    """Other lengths, none to three images, in one batch; then three more rows for each."""
    cases = golden_json("manifest")["cases"]
    ids = [list(prompt.token_ids) for case in cases for prompt in case_prompts(case)]
    images = [sample for case in cases for sample in case_images(case)]
    cache = new_cache(tiny.model, len(ids))
    logits = run_batch(tiny.model, ids, images, cache)
    steps = [run_batch(tiny.model, [[t]] * len(ids), [[]] * len(ids), cache) for t in (3, 1, 4)]
    for sample in range(len(ids)):
        expected = whole(tiny.model, [*ids[sample], 3, 1, 4], images[sample])
        got = torch.cat([logits[sample], *(step[sample] for step in steps)])
        assert_close(f"sample {sample}", got, expected, TOLERANCE)


@pytest.mark.parametrize("seed", range(8))
def test_random_turns_of_random_models_equal_one_pass(seed):
    draw = random.Random(seed)
    config = random_config(seed)
    model, image_id = random_model(config, seed), config.text.image_token_id
    batch = draw.randint(1, 3)
    cache = new_cache(model, batch)
    history = [([], [], []) for _ in range(batch)]
    for _ in range(3):
        turn = []
        for ids, _, _ in history:
            count = draw.randint(0, 2)
            new = random_token_ids(config, count, draw.randint(2, 6), draw)
            if ids and ids[-1] == new[0] == image_id:
                new[0:0] = [0]  # else it would continue the group of the last turn
            turn.append((new, random_images(config, count, draw)))
        logits = run_batch(model, [t[0] for t in turn], [t[1] for t in turn], cache)
        for (ids, images, rows), (new_ids, new_images), out in zip(
            history, turn, logits, strict=True
        ):
            ids.extend(new_ids)
            images.extend(new_images)
            rows.append(out)
    for sample, (ids, images, rows) in enumerate(history):
        assert_close(f"sample {sample}", torch.cat(rows), whole(model, ids, images), 1e-4)
