"""The tokenizer, trained on the recipe's own text, and Llama 3's chat layout on top of it."""

import io
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

import sentencepiece

from embedded.questions import NO_PICTURE, SMALL_TALK, SYSTEM_MESSAGES, ask
from embedded.scenes import sample_scene
from embedded.sources import Sources

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|reserved_special_token_2|>",
)
"""Ids N, N + 1, … after N SentencePiece pieces. `<|image|>` follows, past the vocabulary."""

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
    """Text and messages to ids."""

    def __init__(self, path: Path):
        self.path = path
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.first_special = self.pieces.vocab_size()

    def __reduce__(self):
        return Chat, (self.path,)

    def special(self, name: str) -> int:
        """Id of a special token."""
        return self.first_special + SPECIAL_TOKENS.index(name)

    @cached_property
    def vocab_size(self) -> int:
        """All ids that the model can generate."""
        return self.first_special + len(SPECIAL_TOKENS)

    @property
    def image(self) -> int:
        """Id of `<|image|>`."""
        return self.vocab_size

    @property
    def padding(self) -> int:
        """What fills short rows; nothing looks at it."""
        return self.special("<|finetune_right_pad_id|>")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        return self.pieces.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Plain text of ids; special ones are left out."""
        return self.pieces.decode([i for i in ids if i < self.first_special])

    def _header(self, role: str) -> list[int]:
        return [
            self.special("<|start_header_id|>"),
            *self.encode(role),
            self.special("<|end_header_id|>"),
            *self.encode("\n\n"),
        ]

    def prompt(self, messages: list[Message]) -> list[int]:
        """All messages, and the header of the answer to come."""
        ids = [self.special("<|begin_of_text|>")]
        for message in messages:
            ids += self._header(message.role) + [self.image] * message.images
            ids += [*self.encode(message.text), self.special("<|eot_id|>")]
        return ids + self._header("assistant")

    def answer(self, text: str) -> list[int]:
        """An answer and its end."""
        return [*self.encode(text), self.special("<|eot_id|>")]
