"""The recipe of the embedded model: its data, tokenizer, optimizer, checkpoints and exam."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from conftest import Conversation, assert_close
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "pico"))

import train
from recipe import training
from recipe.answers import answer
from recipe.batches import Pages, Quizzes, Rows
from recipe.chat import Chat, Message, train_tokenizer
from recipe.drawing import CHARACTERS, IGNORED, LABELS, draw, label_patches
from recipe.exam import make_exam
from recipe.export import export
from recipe.forward import hidden_states
from recipe.model import Seer, Student, model_config, vision_config, widen
from recipe.optimizer import orthogonalize
from recipe.questions import ask, ask_about_both, describe, place_of
from recipe.sampling import sample_page, sample_scene
from recipe.scenes import SHAPES, Background, Canvas, Scene, Shape, TextLine, glyphs_of
from recipe.sources import COLORS, TRAINED_FAMILIES, UNSEEN_FAMILIES, Face, Sources, sample_rgb

from llama_vision import LlamaVision
from llama_vision.engine.segments import image_groups
from llama_vision.inputs.image import TiledImage, tile_image

MINIMAL = Sources.minimal()
WHITE = Background((255, 255, 255), (255, 255, 255), "white")


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Chat:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(path, MINIMAL)
    return Chat(path)


def a_shape(kind: str, color: str, box) -> Shape:
    return Shape(kind, color, sample_rgb(Random(0), color), box, 0.0, 0.0)


def a_scene(size=(112, 112), shapes=(), lines=()) -> Scene:
    return Scene(size, Canvas.of(size, 112, 4), WHITE, list(shapes), list(lines))


def a_line(text: str, at: tuple[float, float], size: int = 24) -> TextLine:
    face = Face(None)
    font = face.at(size)
    box = (at[0], at[1] + font.getbbox("H", anchor="ls")[1], at[0] + font.getlength(text), at[1])
    return TextLine(text, "black", (0, 0, 0), face, size, at, box)


def labels_of(scene: Scene) -> dict[str, np.ndarray]:
    return dict(zip(LABELS, label_patches(scene, 112, 14), strict=True))


def test_a_batch_hangs_on_its_number_and_seed_alone():
    pages = Pages(MINIMAL, "a", 3)
    first, second = pages[5], Pages(MINIMAL, "a", 3)[5]
    assert torch.equal(first.pixels, second.pixels)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.pixels, pages[6].pixels)
    assert not torch.equal(first.pixels, Pages(MINIMAL, "b", 3)[5].pixels)


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 1), (2, 2), (1, 4)])
def test_pictures_land_on_the_grid_that_was_asked_for(grid):
    for seed in range(5):
        for sample in (sample_scene, sample_page):
            scene = sample(Random(seed), MINIMAL, grid, 112)
            tiled = tile_image(draw(scene), tile_size=112, max_tiles=4)
            assert tiled.grid == grid == scene.canvas.grid
            assert label_patches(scene, 112, 14).shape == (len(LABELS), grid[0] * grid[1], 64)


def test_no_two_color_names_share_a_color():
    rng = Random(0)
    seen: dict[tuple, str] = {}
    for _ in range(4000):
        name = rng.choice(COLORS)
        rgb = tuple(level // 16 for level in sample_rgb(rng, name))
        assert seen.setdefault(rgb, name) == name


def test_labels_of_a_shape():
    labels = labels_of(a_scene(shapes=[a_shape("star", "red", (70, 0, 112, 42))]))
    star = np.zeros((8, 8), bool)
    star[0:3, 5:8] = True
    assert np.array_equal(labels["shape"].reshape(8, 8) > 0, star)
    assert set(labels["shape"][0][star.ravel()]) == {SHAPES.index("star") + 1}
    assert set(labels["color"][0][star.ravel()]) == {COLORS.index("red") + 1}
    assert labels["anchor"].reshape(8, 8).nonzero() == (1, 6)
    assert set(labels["third_x"][0][star.ravel()]) == {2}
    assert set(labels["third_y"][0][star.ravel()]) == {0}


def test_labels_follow_the_printed_characters():
    """Ink is found where a character is labelled, and the labels read the text."""
    scene = a_scene(size=(224, 112), lines=[a_line("Hi 42", (20, 60), size=48)])
    labels = labels_of(scene)
    halves = np.stack([labels["left_char"], labels["right_char"]], -1)  # [2, 64, 2]
    middle = halves.reshape(2, 8, 8, 2).transpose(1, 0, 2, 3).reshape(8, 32)[3]
    read = [CHARACTERS[c - 1] for i, c in enumerate(middle) if c and c != middle[i - 1]]
    assert "".join(read) == "Hi42"
    grey = np.asarray(draw(scene).convert("L"))
    for glyph in glyphs_of(scene):
        left, top, right, bottom = (round(x) for x in glyph.box)
        assert grey[top:bottom, left:right].min() < 64, glyph
    places = [(g.char, g.place_in_word, g.word) for g in glyphs_of(scene)]
    assert places == [("H", 0, 0), ("i", 1, 0), ("4", 0, 1), ("2", 1, 1)]


def answers(scene: Scene, kind: str) -> dict[str, str]:
    """Every question of a type that turns up in many tries."""
    asked = (q for seed in range(60) for q in ask(scene, Random(seed), 4, (kind,)))
    return {q.text: q.answer for q in asked}


def test_answers_are_read_off_the_scene():
    circle = a_shape("circle", "red", (5, 40, 30, 65))
    square = a_shape("square", "blue", (80, 42, 105, 67))
    scene = a_scene(shapes=[circle, square], lines=[a_line("exit", (30, 105), 16)])
    assert describe(scene) == 'A red circle, a blue square and the text "exit".'
    assert place_of(scene, circle) == "middle left"
    assert answers(scene, "color")["What color is the circle?"] == "The circle is red."
    assert answers(scene, "shape")["What shape is blue?"] == "A square."
    assert answers(scene, "text")["What does the text say?"] == "exit"
    assert answers(scene, "relation")["What is right of the red circle?"] == "A blue square."
    counts = answers(scene, "count")
    assert counts["How many shapes are there?"] == "There are two shapes."
    assert counts["How many squares are there?"] == "There is one square."
    assert counts["How many stars are there?"] == "There are no stars."
    yes_no = answers(scene, "yes_no")
    assert yes_no["Is there a red circle?"] == "Yes."
    assert yes_no["Is there a blue circle?"] == "No."
    assert answers(scene, "place")["Where is the square?"] == "In the middle right."


def test_what_is_not_there_is_said_not_to_be():
    scene = a_scene(shapes=[a_shape("circle", "red", (5, 40, 30, 65))])
    assert answers(scene, "color")["What color is the star?"] == "There is no star."
    assert answers(scene, "text")["What does the text say?"] == "There is no text."


def test_doubtful_questions_are_not_asked():
    near_a_third = a_shape("circle", "red", (27, 40, 47, 60))
    assert place_of(a_scene(), near_a_third) is None
    two = [a_shape("star", "red", (5, 5, 25, 25)), a_shape("star", "blue", (80, 5, 100, 25))]
    assert not any("the star" in text for text in answers(a_scene(shapes=two), "color"))
    diagonal = [a_shape("star", "red", (5, 5, 25, 25)), a_shape("cross", "blue", (80, 80, 99, 99))]
    relations = answers(a_scene(shapes=diagonal), "relation")
    assert all(answer == "Nothing." for answer in relations.values())


def test_two_pictures_are_asked_about_without_saying_which():
    first = a_scene(shapes=[a_shape("star", "red", (5, 5, 25, 25))], lines=[a_line("a", (40, 90))])
    second = a_scene(lines=[a_line("b", (40, 90))])
    for seed in range(30):
        for question in ask_about_both(first, second, Random(seed), 5):
            assert question.type != "text"
            assert "background" not in question.text


@pytest.mark.parametrize(
    "text",
    ["There is no star.", "  two  spaces ", "a\n\nb", "Grüße, 世界 🙂", "A", "<|eot_id|>", "users"],
)
def test_the_tokenizer_gives_any_text_back(chat, text):
    ids = chat.tokenizer.encode(text)
    assert chat.tokenizer.decode(ids) == text
    assert max(ids) < chat.first_special


def test_printed_text_is_read_character_by_character(chat):
    assert len(chat.tokenizer.encode("harbor")) == 6
    assert len(chat.tokenizer.encode("X7K2")) == 4
    assert len(chat.tokenizer.encode("What color is the star?")) == 6


def test_prompts_have_the_layout_of_llama_3(chat):
    ids = chat.prompt([Message("system", "Be kind."), Message("user", "Hi", 1)])
    assert chat.tokenizer.decode(ids, special=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<|image|>Hi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert chat.tokenizer.image_id == chat.vocab_size == chat.first_special + 12


def test_only_the_answer_and_its_end_are_learned(chat):
    rows = [([Message("user", "Hi")], "Hello!"), ([Message("user", "What is it?", 1)], "A cat.")]
    batch = Rows.of(chat, rows)
    for targets, (_, said) in zip(batch.targets, rows, strict=True):
        learned = targets[targets != IGNORED].tolist()
        assert learned == chat.answer(said)
        assert learned[-1] == chat.tokenizer.special_ids["<|eot_id|>"]


@pytest.mark.parametrize("tiles", [1, 3])
def test_quizzes_of_all_layouts(chat, tiles):
    quizzes = Quizzes(MINIMAL, chat, "t", tiles={tiles: 1}, size=4, questions=2, pages=0.25)
    shown = set()
    for number in range(30):
        quiz = quizzes[number]
        assert len(quiz.pictures.pixels) == 4
        assert len(quiz.shown) == len(quiz.rows.ids) == len(quiz.types)
        images = (quiz.rows.ids == chat.tokenizer.image_id).sum(1)
        assert set(images.tolist()) == {quiz.shown.shape[1]}
        assert not (quiz.talk.ids == chat.tokenizer.image_id).any()
        shown.add(quiz.shown.shape[1])
    assert shown == {1, 2}


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 6, 20), (3, 20, 6)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    """Of matrices whose singular values are known, and not too small for five steps."""
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrices = left * torch.linspace(1, 0.1, min(shape[1:])) @ right
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_widening_keeps_what_one_tile_has_learned():
    seer = Seer.new(vision_config(32, 1), 32)
    for parameter in seer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    wide = widen(seer.vision, 4)
    for name, value in seer.vision.state_dict().items():
        if "tile" not in name or name.endswith("gate"):
            assert torch.equal(wide.state_dict()[name], value), name
    table = "gated_positional_embedding.tile_embedding.weight"
    narrow, wider = (v.get_parameter(table)[1].view(-1, 65, 32) for v in (seer.vision, wide))
    torch.testing.assert_close(wider[0], narrow[0])
    assert not torch.equal(wider[1], wider[0])


def test_widening_blanks_the_tokens_of_padding_tiles():
    wide = widen(Seer.new(vision_config(32, 1), 32).vision, 4)
    seen = []
    wide.layernorm_pre.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    wide(torch.randn(2, 2, 3, 112, 112), torch.tensor([2, 5]))  # grids (1, 2) and (2, 1)
    assert seen[0][:, :2].abs().amax((2, 3)).min() > 0.1
    torch.testing.assert_close(seen[0][:, 2:], torch.zeros(2, 2, 65, 32), atol=1e-5, rtol=0)


def test_rows_trained_together_are_those_that_a_prompt_is_prefilled_with():
    """Several groups of several pictures, with text before, between and after them."""
    torch.manual_seed(0)
    model = Student.new(model_config(300, 32)).model.eval()
    config, rng = model.config.text, Random(0)
    tiles = [
        TiledImage(torch.randn(2, 3, 112, 112), grid, model.config.vision.aspect_id(grid))
        for grid in ((1, 2), (2, 1), (1, 2))
    ]
    rows, shown = [], []
    for _ in range(8):
        row = [config.image_token_id] * 4 + [rng.randrange(300) for _ in range(rng.randint(1, 8))]
        rng.shuffle(row)
        rows.append(row)
        shown.append([rng.randrange(len(tiles)) for _ in range(4)])
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    with torch.inference_mode():
        pixels = torch.stack([image.pixels for image in tiles])
        features = model.encode(pixels, torch.tensor([image.aspect_id for image in tiles]))
        hidden = hidden_states(model.text, ids, features, torch.tensor(shown))
    groups = 0
    for row, pictures, states in zip(rows, shown, hidden, strict=True):
        images = [tiles[picture] for picture in pictures]
        logits = Conversation(model, text=16, visual=520).go_on(row, images)
        assert_close(str(row), model.text.logits(states[: len(row)]), logits, 2e-5)
        groups += len(image_groups(row, config.image_token_id))
    assert 8 < groups < 32


def test_every_parameter_is_initialised_and_every_gate_open():
    torch.manual_seed(0)
    for name, parameter in Student.new(model_config(300, 32)).named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.abs().max() < 10, name
        if parameter.shape == (1,):
            assert 0.3 <= parameter.item() <= 0.8, name


def smoke_settings(folder: Path) -> train.Settings:
    return train.Settings(folder, 32, "cpu", 0, 0, 4, True)


def test_a_stopped_stage_goes_on_from_its_checkpoint(tmp_path):
    settings = smoke_settings(tmp_path)
    build, batches = partial(train.new_seer, settings), partial(train.page_stream, settings)
    stage = training.Stage("A", 0.4 / 3600, build, batches, train.page_losses)
    recorder = training.Recorder(tmp_path)
    training.train(stage, stage.build(), recorder)
    before = recorder.load("A")
    assert before["progress"]["step"] > 0
    unchanged = training.train(stage, stage.build(), recorder)
    for name, value in unchanged.state_dict().items():
        assert torch.equal(value, before["module"][name]), name
    training.train(replace(stage, hours=stage.hours + 2 / 3600), stage.build(), recorder)
    assert recorder.load("A")["progress"]["step"] > before["progress"]["step"]


def test_the_whole_recipe_ends_in_a_checkpoint_that_answers(tmp_path):
    settings = smoke_settings(tmp_path)
    student = train.run(settings, dict.fromkeys("ABC", 0.5 / 3600), helpers=0, log_every=0.1)
    export(student.model, settings.chat, tmp_path / "checkpoint")
    model = LlamaVision.from_pretrained(tmp_path / "checkpoint", device="cpu")
    pairs = zip(student.model.named_parameters(), model.model.parameters(), strict=True)
    for (name, ours), theirs in pairs:
        assert torch.equal(ours.bfloat16(), theirs), name
    assert model.model.vision.padding_tiles_alike
    model = LlamaVision.from_pretrained(tmp_path / "checkpoint", device="cpu", dtype="float32")
    items = make_exam(4, 2, minimal=True)
    assert items == make_exam(4, 2, minimal=True)
    answers = answer(model, items, items, batch=3)
    assert answers == [answer(model, [item], [item], batch=1)[0] for item in items]


def test_unseen_families_are_not_trained():
    assert not set(UNSEEN_FAMILIES) & set(TRAINED_FAMILIES)
