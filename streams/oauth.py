"""Tokens for OAUTHBEARER, by the client credentials grant (RFC 6749, section 4.4)."""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import aiohttp
from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import SaslAuthenticationFailed

_TIMEOUT = aiohttp.ClientTimeout(total=10)
_KEPT = 0.8  # of a token's life; then the next connection asks for a new one
_UNKNOWN_LIFE_SECONDS = 60.0


class TokenProvider(AbstractTokenProvider):  # type: ignore[misc]
    """Gives each new connection a token, a kept one while it is good.

    Clients of several event loops may share one: at worst two ask at the same time.
    """

    def __init__(self, url: str, client_id: str, secret: str, scope: str | None, cafile: Path | None) -> None:
        self._url = url
        # Encoded as in a form before they become a header: section 2.3.1.
        self._header = {"Authorization": aiohttp.encode_basic_auth(quote_plus(client_id), quote_plus(secret))}
        self._form = {"grant_type": "client_credentials", **({"scope": scope} if scope else {})}
        self._tls = ssl.create_default_context()
        if cafile:
            self._tls.load_verify_locations(cafile)
        self._kept: tuple[str, float] | None = None

    async def token(self) -> str:
        """A token that is good now. Raises SaslAuthenticationFailed, one line."""
        if self._kept and time.monotonic() < self._kept[1]:
            return self._kept[0]
        asked = time.monotonic()
        answer = await self._ask()
        token, life = answer.get("access_token"), answer.get("expires_in", _UNKNOWN_LIFE_SECONDS)
        if not isinstance(token, str) or not isinstance(life, int | float):
            raise SaslAuthenticationFailed(f"{self._url} answers without a token")
        self._kept = token, asked + _KEPT * life
        return token

    async def _ask(self) -> dict[str, Any]:
        try:
            async with (
                aiohttp.ClientSession(headers=self._header, timeout=_TIMEOUT) as session,
                session.post(self._url, data=self._form, ssl=self._tls) as response,
            ):
                if response.status != 200:
                    raise SaslAuthenticationFailed(f"{self._url} gives no token: {response.status} {response.reason}")
                found = await response.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise SaslAuthenticationFailed(f"{self._url} gives no token: {error or type(error).__name__}") from error
        return found if isinstance(found, dict) else {}
