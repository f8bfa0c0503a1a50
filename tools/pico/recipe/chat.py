"""The tokenizer, trained on the recipe's own text, and Llama 3's chat layout on top of it."""

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

import sentencepiece
from PIL import Image

from llama_vision.inputs.chat import chat_prompt
from llama_vision.inputs.tokenizer import SPECIAL_TOKENS, Tokenizer
from llama_vision.inputs.vocabulary import Pieces
from recipe.questions import ask
from recipe.sampling import sample_scene
from recipe.sources import Sources
from recipe.talk import NO_PICTURE, SMALL_TALK, SYSTEM_MESSAGES

ANY_IMAGE = Image.new("RGB", (1, 1))
"""Stands for a picture where only its place in the text matters."""

PRINTED = "".join(chr(code) for code in range(33, 127))


def template_words(sources: Sources, scenes: int = 3000) -> list[str]:
    """The words of questions and answers, as they stand after a space, and of the chat layout.

    They become whole pieces; everything printed in pictures stays in single characters, because the
    decoder reads a text character by character. What is quoted is therefore left out here.
    """
    counts: Counter[str] = Counter()
    rng = Random("tokenizer")
    texts = [part for exchange in SMALL_TALK for part in exchange] + [NO_PICTURE, *SYSTEM_MESSAGES]
    for number in range(scenes):
        scene = sample_scene(
            rng, sources, (1, 1), 112, ("text", "shapes", "count", "mixed")[number % 4]
        )
        for question in ask(scene, rng, 8):
            texts.append(question.text)
            if question.type not in ("text", "line"):
                texts += question.answer.split('"')[::2]
    for text in texts:
        counts.update(f"▁{word.strip('.,!?')}" for word in text.split(" ")[1:])
        first = text.split(" ")[0].strip(".,!?")
        # Words that begin a question are never printed with a capital by accident: five letters.
        if len(first) >= 5 or first in ("What", "How", "Is", "The", "In", "Yes"):
            counts[first] += 1
    frequent = sorted(word for word, count in counts.items() if count >= 2 and len(word) > 2)
    return [
        "user",
        "assistant",
        "system",
        "\n\n",
        "▁",
        '▁"',
        *(word for word in frequent if word.isprintable()),
    ]


def train_tokenizer(path: Path, sources: Sources) -> None:
    """Write a SentencePiece model: characters, template words as pieces of their own, bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PRINTED, *(f"{a}{b}" for a in PRINTED for b in PRINTED[:2])]),
        model_writer=model,
        model_type="char",
        vocab_size=4000,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=template_words(sources),
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_id=0,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


@dataclass(frozen=True)
class Message:
    """One turn. `images` pictures come before the text."""

    role: str
    text: str
    images: int = 0


class Chat:
    """Texts and messages to the ids that the package will make of them; travels to processes."""

    def __init__(self, path: Path):
        self.path = path
        pieces = Pieces(path.read_bytes())
        self.first_special = pieces.size
        self.vocab_size = pieces.size + len(SPECIAL_TOKENS)
        self.tokenizer = Tokenizer(pieces, self.first_special, self.vocab_size)
        self.padding = self.tokenizer.special_ids["<|finetune_right_pad_id|>"]

    def __reduce__(self):
        return Chat, (self.path,)

    def prompt(self, messages: list[Message]) -> list[int]:
        """All messages, and the header of the answer to come."""
        turns = [{"role": m.role, "content": [*[ANY_IMAGE] * m.images, m.text]} for m in messages]
        return list(chat_prompt(turns, self.tokenizer).token_ids)

    def answer(self, text: str) -> list[int]:
        """An answer and its end."""
        return [*self.tokenizer.encode(text), self.tokenizer.special_ids["<|eot_id|>"]]
