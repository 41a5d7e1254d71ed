"""A search that shows what it has found so far. Two people follow one request; it runs once.

rqarm worker --handlers examples/follow.py      # in one terminal
python examples/follow.py                       # in others
"""

from __future__ import annotations

import time

from rqarm import BatchRequest, Context, FollowKind, Handlers, RequestManager

SHELVES = {
    "history": ["Rome", "The Silk Roads", "The Time of Rome"],
    "science": ["Time", "Cosmos", "A Short Time"],
    "fiction": ["The Time Machine", "Dune", "Solaris"],
}

handlers = Handlers()


@handlers.route("/search/{word}", ttl=600)
def search(request: BatchRequest, context: Context, word: str, pause: float = 0.0) -> list[str]:
    """Every title with the word, shelf after shelf. ``pause``: seconds for each, so that there is something to see."""
    found: list[str] = []
    for n, (shelf, titles) in enumerate(SHELVES.items(), 1):
        time.sleep(pause)
        hits = [title for title in titles if word.lower() in title.lower()]
        found += hits
        context.emit({"shelf": shelf, "titles": hits})
        context.progress(n / len(SHELVES), f"{n} of {len(SHELVES)} shelves")
    return found


def show(rm: RequestManager, request: BatchRequest) -> None:
    """Submit it, and print all that it tells. Whoever comes second gets first what the first has seen already."""
    status = rm.submit(request)
    print(f"{status.outcome}: {request.canonical}")
    for event in rm.follow(status.key, timeout=60):
        match event.kind:
            case FollowKind.EMITTED:
                print(f"  on the shelf {event.value['shelf']}: {', '.join(event.value['titles']) or 'nothing'}")
            case FollowKind.PROGRESS:
                print(f"  {event.message}")
            case FollowKind.RESTARTED:
                print("  the worker died, another begins anew: forget the above")
            case FollowKind.RESULT:
                print(f"in all: {', '.join(event.value)}")
            case FollowKind.ERROR:
                print(f"no answer: {event.error}")


if __name__ == "__main__":
    with RequestManager() as manager:
        show(manager, search.request("time", pause=1.0))
