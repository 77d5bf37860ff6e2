"""Attempts at what a server or the network may refuse for a while, such as a fetch or a copy."""

import socket
import ssl
import sys
import time
import urllib.error
from collections.abc import Callable
from http.client import HTTPException
from typing import TypeVar

from lightspan.core.errors import UserError, printable

PAUSES_S = (1.0, 4.0, 15.0)  # before each new attempt
T = TypeVar("T")


class FetchError(UserError):
    """What is behind the network cannot be had. That says nothing about the data: no sample is left out for it."""


def retried(fetch: Callable[[], T]) -> T:
    """`fetch()`, retried after each of PAUSES_S if the failure of network or server may be temporary.

    Raises: FetchError with the message and the cause of the UserError of `fetch`, if it has any other cause, or of the
        last attempt, with the number of attempts.
    """
    for pause_s in PAUSES_S:
        try:
            return fetch()
        except UserError as error:
            if not _may_pass(error.__cause__):
                raise FetchError(str(error)) from error.__cause__
            print(printable(f"lightspan: {error}; trying again in {pause_s:g} s"), file=sys.stderr, flush=True)
            time.sleep(pause_s)
    try:
        return fetch()
    except UserError as error:
        raise FetchError(f"{error} (attempt {len(PAUSES_S) + 1}, the last)") from error.__cause__


def _may_pass(cause: BaseException | None) -> bool:
    if isinstance(cause, urllib.error.HTTPError):
        return cause.code in (408, 425, 429) or cause.code >= 500  # too slow, too early, too many, server errors
    if isinstance(cause, urllib.error.URLError) and isinstance(cause.reason, BaseException):
        cause = cause.reason
    if isinstance(cause, ssl.SSLCertVerificationError):
        return False
    if isinstance(cause, socket.gaierror):
        return cause.errno == socket.EAI_AGAIN
    return isinstance(cause, HTTPException | ConnectionError | TimeoutError | ssl.SSLError)
