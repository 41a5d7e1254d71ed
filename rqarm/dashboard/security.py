"""Who may ask for what: credentials, Host, origin, read-only. And what every answer tells the browser.

The guard runs before every view, rq-dashboard's included. It decides on headers alone and reads no body. A refusal is
an HTTP error whose text says what to do; nothing has been done then.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import logging
import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit

from flask import Response, g, request
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import Forbidden, HTTPException, MethodNotAllowed, TooManyRequests, Unauthorized

from rqarm.dashboard.options import Options, is_loopback
from rqarm.text import plain

log = logging.getLogger("rqarm.dashboard")

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
#: answered to everybody: they say nothing but whether it lives, and probes know neither names nor passwords
OPEN = ("healthz", "readyz")

#: of every page of ours. No inline script or style, nothing from elsewhere
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'; "
    "img-src 'self' data:"
)
#: of a download: should a browser show it after all, nothing in it runs
SANDBOX = "default-src 'none'; frame-ancestors 'none'; sandbox"


def rq_policy(nonce: str) -> str:
    """Of rq-dashboard's pages: it has one inline script (the nonce), compiles its templates in the browser (eval) and
    sets styles in elements. What it shows is escaped by then, see rqarm.dashboard.rq."""
    return (
        f"default-src 'self'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
    )


class Misdirected(HTTPException):
    """The Host header names another site: a page there may have bound its name to this address (DNS rebinding)."""

    code = 421
    name = "Misdirected Request"


class Strikes:
    """Wrong credentials by address: after MOST in WINDOW_S seconds none are looked at, right ones neither.

    In memory, so of this process only. An IPv6 address counts for its /64, which one machine has for itself.
    """

    MOST, WINDOW_S = 10, 60.0
    #: addresses that are kept, those with the latest strike
    ADDRESSES = 10_000

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._times: OrderedDict[str, list[float]] = OrderedDict()

    def wait(self, address: str) -> float:
        """Seconds until the address may try again; 0 = now."""
        with self._lock:
            times = self._recent(_network(address))
            return times[-self.MOST] + self.WINDOW_S - self._clock() if len(times) >= self.MOST else 0.0

    def add(self, address: str) -> None:
        """One more from this address."""
        name = _network(address)
        with self._lock:
            self._times[name] = [*self._recent(name), self._clock()]
            self._times.move_to_end(name)
            if len(self._times) > self.ADDRESSES:
                self._times.popitem(last=False)

    def _recent(self, name: str) -> list[float]:
        since = self._clock() - self.WINDOW_S
        return [moment for moment in self._times.get(name, ()) if moment > since]


def _network(address: str) -> str:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else address


class Guard:
    """The checks, in the order in which they are made."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._hosts = {name.lower() for name in options.hosts}
        self._strikes = Strikes()

    def check(self, view: str) -> None:
        """Let the request pass, or raise. ``view``: the name of the view that would answer, "" = none."""
        g.rqarm_user = "-"
        if view in OPEN:
            g.rqarm_is_known = not self.options.has_credentials or self._known_user() is not None
            return
        self._check_host()
        self._check_user()
        self._check_origin(view)
        if request.method not in SAFE_METHODS and self.options.read_only:
            raise Forbidden("This dashboard is read-only.")

    # -- who

    def _check_user(self) -> None:
        g.rqarm_is_known = True
        if not self.options.has_credentials:
            return
        if wait := self._strikes.wait(request.remote_addr or ""):
            seconds = math.ceil(wait)
            raise TooManyRequests(f"Too many wrong credentials: try again in {seconds} s.", retry_after=seconds)
        user = self._known_user()
        if user is None:
            raise Unauthorized("Credentials are needed.", www_authenticate=self._challenges())
        g.rqarm_user = user

    def _known_user(self) -> str | None:
        """The name behind the credentials, or None. Wrong ones are counted; after too many none are looked at."""
        address = request.remote_addr or ""
        if "Authorization" not in request.headers or self._strikes.wait(address):
            return None
        user = self._user()
        if user is None:
            self._strikes.add(address)
            log.warning("wrong credentials from %s", plain(address or "?"))
        return user

    def _user(self) -> str | None:
        """The name behind the credentials of the request, or None. Compares in constant time."""
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.options.token:
            return "token" if _is_equal(given.strip(), self.options.token) else None
        if scheme.lower() != "basic" or not self.options.username:
            return None
        try:
            name, _, password = base64.b64decode(given, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        # both are compared whatever the first comparison says
        is_name, is_password = _is_equal(name, self.options.username), _is_equal(password, self.options.password)
        return name if is_name and is_password else None

    def _challenges(self) -> list[WWWAuthenticate]:
        found = []
        if self.options.username:
            found.append(WWWAuthenticate("basic", {"realm": "rqarm", "charset": "UTF-8"}))
        if self.options.token:
            found.append(WWWAuthenticate("bearer", {"realm": "rqarm"}))
        return found

    # -- from where

    def _check_host(self) -> None:
        """Without credentials only names that nobody else can claim are answered.

        A foreign page can bind its own name to 127.0.0.1 and then read what it likes; but it has no credentials, so
        with them the name does not matter.
        """
        if not self._hosts and (self.options.has_credentials or not self.options.is_loopback):
            return
        name = _name_of(request.headers.get("Host", ""))
        if not is_loopback(name) and name not in self._hosts:
            raise Misdirected(f"The dashboard does not answer for {plain(name)!r}: add it to RQARM_DASHBOARD_HOSTS.")

    def _check_origin(self, view: str) -> None:
        """A change comes from our own pages or from no browser. As CrossOriginProtection in Go's net/http.

        The stream changes nothing, but holds a thread: that is not given to foreign pages either.
        """
        if request.method in SAFE_METHODS and view != "stream":
            return
        origin = request.headers.get("Origin", "")
        if origin and origin in self.options.origins:
            return
        site = request.headers.get("Sec-Fetch-Site", "")
        if site:
            if site not in ("same-origin", "none"):
                raise Forbidden("A change must come from the dashboard itself, not from another site.")
        elif origin and _netloc(origin) != request.headers.get("Host", "").lower():
            raise Forbidden("A change must come from the dashboard itself: Origin and Host differ.")


def harden(response: Response, policy: str = POLICY) -> Response:
    """The headers of every answer of ours. One that has a policy already keeps it."""
    headers = response.headers
    headers.setdefault("Content-Security-Policy", policy)
    headers["X-Content-Type-Options"] = "nosniff"
    headers["X-Frame-Options"] = "DENY"
    # not `no-referrer`: browsers then send `Origin: null` with our own forms
    headers["Referrer-Policy"] = "same-origin"
    headers["Cross-Origin-Opener-Policy"] = "same-origin"
    headers["Cross-Origin-Resource-Policy"] = "same-origin"
    headers.setdefault("Cache-Control", "no-store")
    return response


def refuse_get(path: str) -> None:
    """rq-dashboard requeues on GET; a link or an image must not change anything."""
    if request.method in SAFE_METHODS and path.lstrip("/").startswith("requeue/"):
        raise MethodNotAllowed(valid_methods=["POST"], description="This changes something: send it by POST.")


def note(action: str, target: str, outcome: str) -> None:
    """Log a change: who, from where, what, and what came of it."""
    told = plain(f"{action} {target}: {outcome}"[:500])
    log.info("%s@%s %s", plain(g.get("rqarm_user", "-")), plain(request.remote_addr or "?"), told)


def new_nonce() -> str:
    return secrets.token_urlsafe(16)


def _is_equal(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode())


def _name_of(host: str) -> str:
    """The host of a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".").lower()
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
