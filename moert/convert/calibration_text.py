"""The text of `moert convert --calibrate`: a file of the user's, or the one that comes with the package, as tokens."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from moert.errors import UsageError
from moert.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moert.convert.calibration import CalibrationText

DEFAULT = "default"
DEFAULT_FILE = Path(__file__).with_name("calibration.txt")
LEAST_TOKENS, MOST_TOKENS = 2048, 65536
WINDOW = 512


def read(text: str) -> str:
    """Return the content of the file `text`, or the text that comes along for "default". UsageError where it cannot be
    read.
    """
    path = DEFAULT_FILE if text == DEFAULT else Path(text).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"The calibration text {path} is not UTF-8: convert it or name another one.") from None
    except OSError as error:
        raise UsageError(f"Cannot read the calibration text {path}: {error.strerror}.") from error


def tokens(text: str, content: str, checkpoint: Path, most: int = MOST_TOKENS) -> CalibrationText:
    """The tokens of `content`, which `text` names, by the tokenizer of a checkpoint.

    Of a long text windows are taken at even distances, `most` tokens in all. Raises UsageError for a text that has too
    few tokens, StoreError for the tokenizer.
    """
    from moert.convert.calibration import CalibrationText  # loads torch

    ids = Tokenizer(checkpoint).encode(content, add_special_tokens=False)
    if len(ids) < LEAST_TOKENS:
        raise UsageError(
            f"The calibration text {text} has {len(ids)} tokens, but at least {LEAST_TOKENS} are needed:"
            " name a longer one, or use --calibrate default."
        )
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    count = min(len(windows), most // WINDOW)
    chosen = [token for i in range(count) for token in windows[i * len(windows) // count]]
    checksum = zlib.crc32(b"".join(token.to_bytes(4, "little") for token in chosen))
    return CalibrationText(f"{Path(text).name} ({checksum:08x})", tuple(chosen))
