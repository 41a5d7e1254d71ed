"""What an operator asks of a running system. Prints a page; changes nothing.

python examples/operator_page.py [text]
"""

from __future__ import annotations

import sys

from rqarm import RequestManager
from rqarm.uri import redact


def report(rm: RequestManager, text: str = "") -> list[str]:
    """The cache in a line, what runs, and what is found for the text."""
    secret = rm.settings.secret_params
    cache = rm.cache.overview()
    lines = [f"cache: {cache.temporary} temporary, {cache.sticky} sticky, {cache.bytes:,} bytes"]
    lines += [f"  {share.entries / cache.sampled:.0%} {share.name}" for share in cache.routes[:5]]
    claims = rm.claims()
    lines.append(f"running: {claims.total}, overdue: {claims.overdue}")
    lines += [f"  {claim.status.worker}: {redact(claim.status.uri, secret)}" for claim in claims.entries[:5]]
    page = rm.search(text, limit=10)
    lines.append(f"found for {text!r}, looked at {page.looked_at} of {page.total}:")
    lines += [f"  {entry.state} {redact(entry.uri, secret)}" for entry in page.entries]
    return lines


def main() -> None:
    with RequestManager() as rm:
        print("\n".join(report(rm, " ".join(sys.argv[1:]))))


if __name__ == "__main__":
    main()
