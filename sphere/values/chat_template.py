"""A tokenizer's chat template as a text around a prompt: the user's turn, and what begins the answer.

    <|im_start|>user\\n{}<|im_end|>\\n<|im_start|>assistant\\n

A prompt, its context before it, stands for "{}"; its target follows behind the whole. Where there is no chat template
the turn is "{}" itself. Knows tokenizers and texts. Knows nothing of models or records.
"""

from __future__ import annotations

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sphere.errors import SphereError
from sphere.values.context_templates import BARE

_PLACE = "what-the-user-says"  # nothing that a template would change


def user_turn(tokenizer: PreTrainedTokenizerBase, chat_template: bool | str) -> str:
    """What prompts are put into: a text with "{}" for the prompt.

    Args:
        chat_template: whether it is the tokenizer's chat template, else "{}" alone; or the text itself.

    Raises:
        SphereError: the tokenizer has no chat template, or one that does not give the user's words back once as they
            are; or the text has no place for the prompt, or several.
    """
    if isinstance(chat_template, bool):
        return _rendered(tokenizer) if chat_template else BARE
    if chat_template.count(BARE) != 1:
        raise SphereError(
            f"The chat template must name the prompt's place once as '{BARE}', got {chat_template!r}.",
            argument="chat_template",
        )
    return chat_template


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template with "{}" for what the user says, up to where the answer begins."""
    if not tokenizer.chat_template:
        raise SphereError(
            "This model's tokenizer has no chat template: use a model that was trained on conversations, or leave "
            "chat_template out.",
            argument="chat_template",
        )
    said = [{"role": "user", "content": _PLACE}]
    try:
        text = str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError) as error:
        raise SphereError(
            f"The tokenizer's chat template does not take a user's turn ({error}): leave chat_template out.",
            argument="chat_template",
        ) from error
    if text.count(_PLACE) != 1 or BARE in text:
        raise SphereError(
            "The tokenizer's chat template must hold what the user says once and as it is, and no '{}' of its own, "
            f"got {text!r}: leave chat_template out.",
            argument="chat_template",
        )
    return text.replace(_PLACE, BARE)


def in_turn(turn: str, text: str) -> str:
    """A prompt, or a context template, in the user's turn."""
    return turn.replace(BARE, text)
