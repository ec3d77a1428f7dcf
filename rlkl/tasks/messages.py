"""Chat messages in the rows of a file: where the prompt ends and the response begins."""

from __future__ import annotations

from rlkl.errors import UserError


def last_turn(messages: object, where: str) -> tuple[list[dict], str]:
    """(what comes before the last message, the text of that message) of a conversation.

    Raises UserError, which starts with `where`, unless the last message is the assistant's and
    another one comes before it.
    """
    if (
        not isinstance(messages, list)
        or len(messages) < 2
        or not all(isinstance(message, dict) for message in messages)
        or messages[-1].get("role") != "assistant"
    ):
        raise UserError(
            f"{where} must be a list of chat messages, a prompt and the assistant's response to it "
            f"as the last one; it is {str(messages)[:60]!r}"
        )
    return messages[:-1], response_text(messages[-1:], where)


def response_text(response: object, where: str) -> str:
    """The text of a response, which may also be a list of one assistant message.

    Raises UserError, which starts with `where`, on anything else.
    """
    if isinstance(response, list) and len(response) == 1 and isinstance(response[0], dict):
        response = response[0].get("content")
    if not isinstance(response, str):
        raise UserError(f"{where} must be text, or a list of one assistant message")
    return response
