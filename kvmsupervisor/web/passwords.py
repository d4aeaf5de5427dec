"""Passwords of HTTP's Basic authentication, against bcrypt hashes that take 50 ms to 3 s of a core each.

So a hash is computed in a thread, one at a time, and a password that was right is remembered as a keyed digest: a
scrape each few seconds costs nothing. A wrong one costs a try of its sender; without one nothing is computed. A name
that nobody has takes as long, and has as many tries, as one that somebody has.

Sources: RFC 7617 (Basic), crypt(5) (bcrypt), <https://pypi.org/project/bcrypt/>.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from kvmsupervisor.web.config_file import HASH
from kvmsupervisor.web.tries import Tries, neighbourhood

ADDRESS_TRIES, ADDRESS_EACH_S = 20, 1.0
"""Wrong passwords from one address, whatever names they come with. Arbitrary: somebody who types needs 3 in a minute; a
browser that has an old password sends it some 8 times at once."""

NAME_TRIES, NAME_EACH_S = 10, 3.0
"""Wrong passwords for one name from one address: so one who tries many does not keep others behind the same address
from coming in, and the guesses at one password are 29,000 a day at most from each address."""

KEPT = 256
"""Right passwords that are remembered. Arbitrary: a team has fewer."""

WAITING = 32
"""Passwords that wait for their turn, at most: with the cost 10 the last one waits for 3 s. Arbitrary."""

BCRYPT_BYTES = 72
"""bcrypt looks at so many; others, too, cut what is longer (crypt(5))."""

DUMMY_COST = 10


class TooMany(Exception):
    """Not looked at.

    Args:
        wait_s: seconds after which to try again.
    """

    def __init__(self, wait_s: int) -> None:
        super().__init__(f"too many wrong passwords; try again in {wait_s} s")
        self.wait_s = wait_s


def bcrypt_fits(password: bytes, hashed: bytes) -> bool:
    """Whether a password is that of a hash. Computes: for a thread."""
    import bcrypt  # noqa: PLC0415 - a page that asks nobody needs none

    try:
        # Of the names that crypt(5) has for one and the same algorithm the library knows these.
        return bcrypt.checkpw(password[:BCRYPT_BYTES], hashed.replace(b"$2x$", b"$2b$", 1))
    except ValueError:
        # A salt that no library would have written, or a NUL.
        return False


class Passwords:
    """Checks names and passwords.

    Args:
        now: seconds of any clock.
        fits: see `bcrypt_fits`.
    """

    def __init__(self, now: Callable[[], float], fits: Callable[[bytes, bytes], bool] = bcrypt_fits) -> None:
        self._fits = fits
        self._users: Mapping[str, bytes] = {}
        self._dummy = b""
        self._key = secrets.token_bytes(32)
        self._right: OrderedDict[bytes, None] = OrderedDict()
        self._of_address = Tries(ADDRESS_TRIES, ADDRESS_EACH_S, now)
        self._of_name = Tries(NAME_TRIES, NAME_EACH_S, now)
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._thread: ThreadPoolExecutor | None = None

    def use(self, users: Mapping[str, bytes]) -> None:
        """From now on: name → hash. A password that was right for another hash is not any more."""
        self._users = users
        matches = (HASH.fullmatch(one) for one in users.values())
        cost = max((int(match["cost"]) for match in matches if match is not None), default=DUMMY_COST)
        # Of no password: its digest is not random. As expensive as the most expensive there is.
        self._dummy = b"$2b$%02d$" % cost + b"." * 53

    async def check(self, name: str, password: bytes, address: str) -> bool:
        """Whether this is the password of that name.

        Raises:
            TooMany: there were too many wrong ones from that address, or too many wait.
        """
        hashed = self._users.get(name)
        place = neighbourhood(address)
        key = (place, hash(name))
        if wait_s := self._of_name.wait_s(key):
            raise TooMany(wait_s)
        digest = self._digest(name, password, hashed)
        if digest in self._right:
            self._right.move_to_end(digest)
            return True
        if wait_s := self._of_address.wait_s(place):
            raise TooMany(wait_s)
        if self._waiting >= WAITING:
            raise TooMany(1)
        # Taken before, and given back: many at once are as many tries.
        self._of_name.take(key)
        self._of_address.take(place)
        right = await self._look(digest, password, self._dummy if hashed is None else hashed) and hashed is not None
        if right:
            self._of_name.give_back(key)
            self._of_address.give_back(place)
        return right

    async def _look(self, digest: bytes, password: bytes, hashed: bytes) -> bool:
        self._waiting += 1
        try:
            async with self._turn:
                # A browser's first eight requests come at once, all with the same.
                if digest in self._right:
                    return True
                if self._thread is None:
                    self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bcrypt")
                loop = asyncio.get_running_loop()
                right = await loop.run_in_executor(self._thread, self._fits, password, hashed)
                if right and hashed is not self._dummy:
                    self._right[digest] = None
                    if len(self._right) > KEPT:
                        self._right.popitem(last=False)
                return right
        finally:
            self._waiting -= 1

    def _digest(self, name: str, password: bytes, hashed: bytes | None) -> bytes:
        """Names what was looked at; nothing can be learnt of the password from it without the key."""
        parts = (name.encode(errors="surrogateescape"), password, hashed or b"")
        framed = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.digest(self._key, framed, "sha256")

    def close(self) -> None:
        """End the thread, after what it computes."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
