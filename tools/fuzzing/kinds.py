"""The kinds of input by name.

Each is a function of a seed and of a folder for files, which prepares what its cases share.
"""

from collections.abc import Callable
from pathlib import Path

from fuzzing import checkpoints, commands, json_in, messages, pictures, pruners, settings
from fuzzing.judge import Kind

KINDS: dict[str, Callable[[int, Path], Kind]] = {
    "pictures": pictures.kind,
    "checkpoints": checkpoints.kind,
    "settings": settings.kind,
    "messages": messages.kind,
    "pruners": pruners.kind,
    "commands": commands.kind,
    "json": json_in.kind,
}
