"""Where a Ray cluster is, and whether it lets this process in. Used by the Ray engine, before Ray is imported and when it has refused.

From 2.52 on a cluster may ask for a token (`RAY_AUTH_MODE=token`; later versions turn it on by themselves where the user has one). Ray's own client shows
the token to a cluster that it has found on its machine, and to one whose address is given only when it is told to: that may be anybody's machine.
An address of this machine is as good as found, so a token is shown there too. A cluster that asks for none does not mind.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from kdcache.errors import UsageError

_REACH_S = 10.0


def show_token_here(address: str | None) -> None:
    """Let Ray, which is not imported yet, show this user's token to a cluster at an address of this machine."""
    if address is None or "RAY_AUTH_MODE" in os.environ or _token_source() is None:
        return
    if _is_here(address.rpartition(":")[0].strip("[]")):
        os.environ["RAY_AUTH_MODE"] = "token"


def check_address(address: str | None) -> None:
    """Raises UsageError for one that is none of a cluster, or where nothing listens: Ray would try for two minutes."""
    if address in (None, "auto", "local"):
        return
    if "://" in address:
        raise UsageError(
            f"--engine ray: {address} is an address for Ray's client or for 'ray job submit'; expected HOST:PORT of the cluster (--ray-address, or"
            f" RAY_ADDRESS), as 'ray start --head' says it, and the command on one of its nodes"
        )
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()):
        raise UsageError(f"--engine ray: address {address!r}: expected HOST:PORT, as 'ray start --head' says it")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except (OSError, OverflowError, UnicodeError) as error:  # the last of a name that no host can have
        raise UsageError(
            f"--engine ray: nothing answers at {address}: {error}; expected the address that 'ray start --head' has said (--ray-address, RAY_ADDRESS)"
        ) from error


def describe_refusal(error: BaseException) -> str | None:
    """What to do about a cluster that wants a token, None for an error of another kind."""
    cause: BaseException | None = error
    while cause is not None and "AuthenticationError" not in f"{type(cause).__name__}: {cause}":
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return None
    mode, source = os.environ.get("RAY_AUTH_MODE"), _token_source()
    if mode != "token":
        why = f"it was shown none, since RAY_AUTH_MODE is {mode or 'not set'}"
    elif source is None:
        why = "none was found here"
    else:
        why = f"that of {source} can't be read, or is another one"
    return (
        f"{why}; set RAY_AUTH_MODE=token, and put the cluster's token ('ray get-auth-token' shows it where the cluster was started) into RAY_AUTH_TOKEN,"
        f" into a file that RAY_AUTH_TOKEN_PATH names, or into ~/.ray/auth_token"
    )


def _token_source() -> str | None:
    """Where Ray finds a token, in its order; None without one."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        if os.environ.get(name):
            return name
    return "~/.ray/auth_token" if (Path.home() / ".ray" / "auth_token").is_file() else None


def _is_here(host: str) -> bool:
    """Whether a name or number is one of this machine's: only its own can be bound."""
    try:
        places = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    for family, kind, protocol, _, place in places:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind(place)
            except OSError:
                continue
            return True
    return False
