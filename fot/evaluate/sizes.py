"""Numbers of tokens as a user writes and reads them: 4096, 16k, 1m."""

import re
from collections.abc import Sequence

from fot.errors import UserError

UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def parse(text: str, flag: str) -> tuple[int, ...]:
    """Returns the sizes in `16k,256k,1m`, in tokens, ascending; 1k is 1,024 tokens, 1m is 1,024k.

    Args:
      text: sizes with commas between them.
      flag: what a wrong one is named by.

    Raises:
      UserError: one of them is no number of tokens.
    """
    return tuple(sorted({_parse(word.strip().lower(), text, flag) for word in text.split(",")}))


def short(tokens: int) -> str:
    """Returns a size as `parse` reads it, in the largest unit that leaves no remainder."""
    unit = max((unit for unit, factor in UNITS.items() if tokens % factor == 0), key=UNITS.get) if tokens else ""
    return f"{tokens // UNITS[unit]}{unit}"


def listed(sizes: Sequence[int]) -> str:
    """Returns sizes as `parse` reads them."""
    return ",".join(map(short, sizes))


def _parse(word: str, text: str, flag: str) -> int:
    match = re.fullmatch(r"(\d+)([kmg]?)", word)
    if not match or int(match[1]) == 0:
        raise UserError(f"--{flag}={text}: {word!r} is no number of tokens: write such as 4096,16k,1m")
    return int(match[1]) * UNITS[match[2]]
