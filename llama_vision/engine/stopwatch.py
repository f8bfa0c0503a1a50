"""What an engine did, and where the time went."""

import time
from dataclasses import dataclass

import torch


class Stopwatch:
    """Adds the seconds spent inside to one entry.

    It waits for the device where a phase hands over to the next. While decoding nothing need be
    waited for: each step ends with its token ids being read.
    """

    def __init__(self, seconds: dict[str, float], name: str, device: torch.device):
        self.seconds, self.name, self.device = seconds, name, device

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.name != "decode" and self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
        self.seconds[self.name] += time.perf_counter() - self.start


@dataclass
class Counts:
    """What an engine has done so far."""

    images: int = 0
    """Images that went through the encoder."""
    prefilled: int = 0
    """Rows of prompts that went through the decoder."""
    generated: int = 0
    """Tokens that were chosen."""
