"""The text that a conversion is calibrated on: a file of the user's, or the one that comes with the package."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moert.errors import UsageError
from moert.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from moert.convert.calibration import CalibrationText

DEFAULT = "default"
DEFAULT_FILE = Path(__file__).with_name("calibration.txt")
LEAST_TOKENS, MOST_TOKENS = 2048, 65536
# Tokens that an expert sees in the mean. From 8,192 to 65,536 the KL of SmolLM2-135M fell by 8% at 2 bits and by 1 to
# 2% at 3 and 4: see moert/docs/quality.md.
MOST_OF_EXPERT = 16384
DEFAULT_TOKENS = 4096  # of the text that comes along, where no text is asked for
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
    ids = Tokenizer(checkpoint).encode(content, add_special_tokens=False)
    if len(ids) < LEAST_TOKENS:
        raise UsageError(
            f"The calibration text {text} has {len(ids)} tokens, but at least {LEAST_TOKENS} are needed:"
            " name a longer one, or use --calibrate default."
        )
    return _chosen(text, ids, most)


def worth_while(checkpoint: Path) -> int:
    """Return how many tokens are of use for a checkpoint, by how many experts a token visits.

    Raises CheckpointError and UnsupportedModelError for the checkpoint.
    """
    from moert.convert.source_model import SourceModel  # loads torch

    arch = SourceModel.open(checkpoint).architecture
    return min(MOST_TOKENS, MOST_OF_EXPERT * arch.num_experts // arch.top_k)


def by_default(checkpoint: Path, say: Callable[[str], None]) -> CalibrationText | None:
    """Return the text for a conversion that names none, DEFAULT_TOKENS of the one that comes along.

    None where that is of no use with the checkpoint's tokenizer, so that its weights have to be rounded: `say` is told
    in a line. Raises CheckpointError and UnsupportedModelError for the checkpoint, StoreError for the tokenizer.
    """
    from moert.convert.source_model import SourceModel  # loads torch

    known = SourceModel.open(checkpoint).architecture.vocab_size
    ids = Tokenizer(checkpoint).encode(read(DEFAULT), add_special_tokens=False)
    if len(ids) < LEAST_TOKENS:
        why = f"for this model it has {len(ids)} of the {LEAST_TOKENS} tokens that are needed"
    elif max(ids) >= known:
        why = f"it has tokens beyond the {known} that this model knows"
    elif 2 * Counter(ids).most_common(1)[0][1] > len(ids):
        why = "for this model most of it is one and the same token"
    else:
        return _chosen(DEFAULT, ids, DEFAULT_TOKENS)
    say(
        f"The text that comes along cannot be used: {why}. The weights are rounded instead, as with --fast, to 2, 3 and"
        " 4 bits unless --widths names others."
    )
    return None


def _chosen(text: str, ids: Sequence[int], most: int) -> CalibrationText:
    from moert.convert.calibration import CalibrationText  # loads torch

    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    count = min(len(windows), most // WINDOW)
    chosen = [token for i in range(count) for token in windows[i * len(windows) // count]]
    checksum = zlib.crc32(b"".join(token.to_bytes(4, "little") for token in chosen))
    return CalibrationText(f"{Path(text).name} ({checksum:08x})", tuple(chosen))
