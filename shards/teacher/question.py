"""The question that the teacher answers: a file of the user's, or the default one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from lavic.errors import ConfigError
from lavic.storage.text_files import TextFileError, read_lines

TITLE = "{title}"
"""Stands for the item's title."""
_DEFAULT = (
    f'The photo shows a product. Its title is "{TITLE}". Describe how the product looks: form, colours, pattern, '
    "material and visible parts. Do not repeat the title, do not guess what the photo does not show, and write "
    "complete sentences, at most five."
)


@dataclass(frozen=True)
class Question:
    """Words to ask for a description, with `{title}` in the place of the title."""

    words: str

    @property
    def version(self) -> str:
        """Version of the question, for the sidecars."""
        return f"question-{hashlib.sha256(self.words.encode()).hexdigest()[:12]}"

    @property
    def segments(self) -> tuple[str, ...]:
        """The words before the title, between titles, and behind."""
        return tuple(self.words.split(TITLE))

    def for_title(self, title: str) -> str:
        """The question about an item; its title on one line."""
        return self.words.replace(TITLE, " ".join(title.split()))


DEFAULT_QUESTION = Question(_DEFAULT)
"""For endpoints, where no file is given."""


def read_question(path: Path) -> Question:
    """The question in a text file.

    Raises:
        ConfigError: The file cannot be read, or is empty.
    """
    try:
        words = "\n".join(line for _, line in read_lines(path)).strip()
    except TextFileError as error:
        raise ConfigError(f"--prompt-file {error}") from None
    if not words:
        raise ConfigError(f"--prompt-file {path}: is empty; write the question, with {TITLE} for the item's title")
    return Question(words)
