"""One Flask app, two ways to ask: at once, or as a batch request for what takes too long.

    flask --app examples/interactive run          and in another terminal
    rqarm worker --handlers examples/cities.py

``GET /cities/FR?min_population=100000`` is answered by this process. ``POST /batch?uri=/distances/FR`` is queued for
the workers: 202 with the Location of the result. Both run the functions of cities.py.
"""

from __future__ import annotations

import math

import cities
from flask import Flask, Response, jsonify, request, send_file, url_for
from flask.typing import ResponseReturnValue

from rqarm import BatchRequest, BatchStatus, Outcome, RequestManager, State, errors

#: what an error of rqarm is to a browser
HTTP_STATUS = {
    errors.InvalidRequest: 400,
    errors.NoHandler: 400,
    errors.RequestUnknown: 404,
    errors.RequestCancelled: 410,
    errors.RequestFailed: 502,
}


def create_app(rm: RequestManager | None = None) -> Flask:
    """The app. ``rm`` is for tests; without it RQARM_URL or the embedded server of this user is taken."""
    app = Flask(__name__)
    rm = rm or RequestManager()
    world = cities.handlers.resources  # world.cities is loaded when it is first needed

    # --- at once: a few milliseconds, so the browser can wait

    @app.get("/cities/<country>")
    def cities_in_country(country: str) -> ResponseReturnValue:
        chosen = cities.cities_of(world.cities, country, request.args.get("min_population", 0, type=int))
        return Response(cities.cities_csv(chosen), content_type="text/csv; charset=utf-8")

    @app.get("/nearest")
    def nearest() -> ResponseReturnValue:
        lat, lon = (request.args.get(name, math.nan, type=float) for name in ("lat", "lon"))
        return jsonify(cities.nearest_cities(world.cities, lat, lon, request.args.get("n", 10, type=int)))

    # --- as a batch request

    @app.route("/batch", methods=["GET", "POST"])
    def submit() -> ResponseReturnValue:
        """Queue ``uri``, join those who asked for the same, or find it done: one round trip whichever it is."""
        wanted = BatchRequest(request.values["uri"])
        cities.handlers.match(wanted)  # raises for what no worker could answer: better now than from the queue
        found = rm.submit(wanted)
        return accepted(found) if found.outcome is not Outcome.REFUSED else ("too many requests wait", 503)

    @app.get("/batch/<key>")
    def status(key: str) -> ResponseReturnValue:
        found = rm.full_status(key)
        return jsonify(public(found)), 404 if found.state is State.UNKNOWN else 200

    @app.get("/batch/<key>/result")
    def result(key: str) -> ResponseReturnValue:
        envelope = rm.cache.envelope(key)
        if envelope.kind == "value":
            return jsonify(rm.cache.get(key))
        # The file is fetched from Redis as it is sent: a large result is never whole in this process.
        answer = send_file(rm.cache.open(key), download_name=envelope.filename or key, as_attachment=True)
        answer.content_type, answer.content_length = envelope.content_type, envelope.size
        return answer

    # --- what is not a result

    def accepted(found: BatchStatus) -> ResponseReturnValue:
        return jsonify(public(found)), 202, {"Location": url_for("result", key=found.key), "Retry-After": "1"}

    def refuse(error: Exception) -> ResponseReturnValue:
        return jsonify(error=str(error)), next(HTTP_STATUS[kind] for kind in type(error).mro() if kind in HTTP_STATUS)

    for kind in HTTP_STATUS:
        app.register_error_handler(kind, refuse)
    app.register_error_handler(errors.ResultNotReady, lambda error: accepted(rm.status(error.key)))
    return app


def public(status: BatchStatus) -> dict[str, object]:
    """A status for strangers: without the traceback."""
    error = status.error and {name: status.error[name] for name in ("type", "message")}
    return {**status.to_dict(), "error": error}


if __name__ == "__main__":
    create_app().run()
