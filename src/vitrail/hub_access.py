"""What models and data sets of the Hugging Face Hub share: the endpoint, and one line for its errors."""

from __future__ import annotations

import os

from vitrail.errors import UserError


def endpoint() -> str | None:
    """`HF_ENDPOINT` now, which huggingface_hub reads only when it is imported; None for the Hub itself."""
    return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None


def refusal(error: Exception, what: str, name: str, revision: str) -> UserError | None:
    """What the Hub says of a repository, `what` is "model" or "data set"; None if it is about the way there."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{name} is gated: accept its terms on its page, then log in with `hf auth login`")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(f"the Hub has no {what} {name}, or a private one: check the name, or log in")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{name} has no revision {revision!r} on the Hub: check or remove it")
    if isinstance(error, errors.HFValidationError):
        return UserError(f"the Hub does not allow the name {name}: check the spelling")
    return None
