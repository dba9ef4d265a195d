"""What stands between a prompt and its target: a blank, where the writing and the prompt's end want one.

The rule, by characters alone (`joiner`). Nothing is put

    1  before a target that begins with white space, and after a prompt that ends with it: a blank or a newline, such
       as that of a chat template's "<|im_start|>assistant\\n"
    2  after an opening bracket, and after a quotation mark that opens: one behind white space, an opening bracket or
       the start of the text, or one of the kind that opens behind a letter of rule 4 (他说“)
    3  after wide punctuation (。、：？」), which holds its own space
    4  after a letter of a script that puts no blanks between words: Chinese and Japanese characters, Thai, Lao, Khmer,
       Burmese, Tibetan and their like (`WITHOUT_BLANKS`). Korean has blanks
    5  after any other end (a digit, "." or ":") where the last letter before it and the target's first letter are both
       of such scripts, or the target has no letter at all: "他出生于1990" + "年"

Everything else, with it all that English is, gets one blank: "The Chinese word for cat is" + " 猫". Knows characters.
Knows nothing of tokenizers or models.
"""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

# Beginnings of the Unicode names of letters (line breaking classes ID, CJ and SA of UAX 14, Hangul left out).
WITHOUT_BLANKS = (
    "CJK ",
    "IDEOGRAPHIC ",
    "HIRAGANA ",
    "KATAKANA",
    "HALFWIDTH KATAKANA ",
    "BOPOMOFO ",
    "YI ",
    "NUSHU ",
    "TANGUT ",
    "THAI ",
    "LAO ",
    "KHMER ",
    "MYANMAR ",
    "TIBETAN ",
    "TAI ",
    "NEW TAI ",
    "AHOM ",
    "JAVANESE ",
    "BALINESE ",
)
STRAIGHT_QUOTES = "\"'`"


def joiner(prompt: str, target: str) -> str:
    """ " " or "": what stands between a prompt and its target; the rule is at the top of this file."""
    if not prompt:
        return "" if target[:1].isspace() else " "
    end, before = prompt[-1], prompt[:-1]
    if target[:1].isspace() or end.isspace() or _opens(end, before):
        return ""
    if _is_wide_punctuation(end):
        return ""
    last = _base(prompt)
    if _is_letter(last):
        return "" if _is_without_blanks(last) else " "
    return "" if _between_letters_without_blanks(prompt, target) else " "


class Continued(NamedTuple):
    """A prompt and what is to follow it.

    Attributes:
        joiner: what stands between them; None: what the rule says.
    """

    prompt: str
    target: str
    joiner: str | None = None

    @property
    def text(self) -> str:
        """Both as one text."""
        return self.prompt + continuation(*self)


def continuation(prompt: str, target: str, given: str | None = None) -> str:
    """A target as it follows its prompt.

    Args:
        given: what stands between them; None: what the rule says.
    """
    return (joiner(prompt, target) if given is None else given) + target


def _opens(end: str, before: str) -> bool:
    """Whether the prompt's last character is a bracket or a quotation mark that something follows at once."""
    kind = unicodedata.category(end)
    if kind == "Ps":
        return True
    if end not in STRAIGHT_QUOTES and kind not in ("Pi", "Pf"):
        return False
    if not before or before[-1].isspace() or unicodedata.category(before[-1]) == "Ps":
        return True
    return kind == "Pi" and (_is_without_blanks(before[-1]) or _is_wide_punctuation(before[-1]))


def spaced(text: str) -> str:
    """A text with blanks around each letter of a script that puts none between words."""
    return "".join(f" {c} " if _is_without_blanks(c) else c for c in text)


def _is_wide_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] == "P" and unicodedata.east_asian_width(character) in "WF"


def _is_letter(character: str) -> bool:
    return character.isalpha() or _is_without_blanks(character)


def _is_without_blanks(character: str) -> bool:
    return unicodedata.name(character, "").startswith(WITHOUT_BLANKS)


def _base(text: str) -> str:
    """The last character but for marks that it carries."""
    for character in reversed(text):
        if unicodedata.category(character) not in ("Mn", "Me", "Cf"):
            return character
    return text[-1]


def _between_letters_without_blanks(prompt: str, target: str) -> bool:
    last = next(filter(_is_letter, reversed(prompt)), "")
    first = next(filter(_is_letter, target), "")
    return bool(last) and _is_without_blanks(last) and (not first or _is_without_blanks(first))
