# The worker of docker-compose.yml. Any command of rqarm runs in it: `docker run IMAGE --help`.
FROM python:3.12-slim

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY rqarm rqarm
COPY examples examples
RUN pip install --no-cache-dir '.[demo,zstd]' \
    && useradd --create-home --uid 10001 rqarm \
    && rm -rf /src/*

USER rqarm
WORKDIR /home/rqarm
ENTRYPOINT ["rqarm"]
CMD ["--help"]
