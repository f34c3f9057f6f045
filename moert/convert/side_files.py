"""Checks, before the hours that a conversion takes, the files that a chat will need beside the weights."""

from __future__ import annotations

from pathlib import Path

from moert.engine.sampling import usable_fields
from moert.errors import CheckpointError, StoreError, TemplateError
from moert.text.chat import check_template
from moert.text.tokenizer import Tokenizer


def check_side_files(folder: Path, vocab_size: int) -> list[str]:
    """Return warnings about files of a checkpoint that a chat can do without, one sentence each.

    vocab_size: tokens that the model knows. Raises CheckpointError for a tokenizer or chat template that cannot be
    used.
    """
    try:
        tokenizer = Tokenizer(folder)
        templates = tokenizer.chat_templates
    except StoreError as error:
        raise CheckpointError(str(error)) from None
    for name, template in templates.items():
        try:
            check_template(template)
        except TemplateError as error:
            which = "" if name == "default" else f" (template {name})"
            raise CheckpointError(
                f"{folder} cannot be used for chats{which}: {error} Correct it there first."
            ) from None
    warnings = [*tokenizer.warnings, *usable_fields(tokenizer.generation_config)[1]]
    unknown = {index: token for token, index in tokenizer.vocabulary.items() if index >= vocab_size}
    if unknown:
        warnings.append(
            f"The tokenizer has {len(unknown)} tokens, such as {unknown[min(unknown)]!r}, beyond the {vocab_size} that "
            "the model knows: prompts that hold them will be refused."
        )
    return warnings
