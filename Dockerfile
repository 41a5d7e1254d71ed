# Any command of rqarm: `docker run IMAGE --help`. The image of docker-compose.yml.

FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY rqarm rqarm
COPY examples examples
# wheels of rqarm and of all that it needs: nothing is built, and nothing fetched, in the image that runs
RUN pip wheel --no-cache-dir --wheel-dir /wheels '.[demo,dashboard,zstd]'

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 rqarm
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels 'rqarm[demo,dashboard,zstd]'

USER rqarm
WORKDIR /home/rqarm
# workers log at once, also into a pipe
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["rqarm"]
CMD ["--help"]
