# Targets: `worker` (transformers engine), `flower`, `gateway`, `producer` (core only: no torch), for docker-compose.yml.
# Every package comes at the version of deploy/constraints/lock.txt.
FROM python:3.11-slim AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Torch's CPU build is a tenth of its CUDA build, which is what PyPI has for Linux: name PyTorch's CPU index here.
ARG PIP_EXTRA_INDEX_URL=
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin tokenfleet \
 && install -d -o tokenfleet -g tokenfleet /var/cache/tokenfleet /var/lib/tokenfleet /var/lib/tokenfleet-media
WORKDIR /src
# Dependencies come before the sources, on a package that is still empty: a change of code does not fetch torch again.
COPY pyproject.toml LICENSE README.md ./
COPY deploy/constraints/lock.txt deploy/constraints/lock.txt
RUN mkdir tokenfleet && touch tokenfleet/__init__.py

FROM base AS wheel
COPY . .
RUN pip wheel --no-deps --wheel-dir /dist .

FROM base AS producer
RUN --mount=type=cache,target=/root/.cache/pip pip install -c deploy/constraints/lock.txt .
COPY --from=wheel /dist /dist
RUN pip install --no-deps --force-reinstall /dist/*.whl && rm -rf /dist /src/*
WORKDIR /home/tokenfleet
USER tokenfleet
CMD ["tokenfleet", "--help"]

FROM base AS flower
RUN --mount=type=cache,target=/root/.cache/pip pip install -c deploy/constraints/lock.txt '.[flower]'
COPY --from=wheel /dist /dist
RUN pip install --no-deps --force-reinstall /dist/*.whl && rm -rf /dist /src/*
WORKDIR /home/tokenfleet
USER tokenfleet
EXPOSE 5555
CMD ["celery", "-A", "tokenfleet.workers.app", "flower", "--address=0.0.0.0", "--port=5555"]

FROM base AS gateway
RUN --mount=type=cache,target=/root/.cache/pip pip install -c deploy/constraints/lock.txt '.[gateway]'
COPY --from=wheel /dist /dist
RUN pip install --no-deps --force-reinstall /dist/*.whl && rm -rf /dist /src/*
# Files of the Batch API: a volume that all gateways share is mounted here.
VOLUME /var/lib/tokenfleet
WORKDIR /home/tokenfleet
USER tokenfleet
EXPOSE 8000
CMD ["tokenfleet", "serve", "--host=0.0.0.0", "--port=8000"]

FROM base AS worker
RUN --mount=type=cache,target=/root/.cache/pip pip install -c deploy/constraints/lock.txt '.[hf]'
COPY --from=wheel /dist /dist
RUN pip install --no-deps --force-reinstall /dist/*.whl && rm -rf /dist /src/*
# Models are fetched and converted once, into the volume mounted here.
ENV XDG_CACHE_HOME=/var/cache HF_HOME=/var/cache/tokenfleet/huggingface
VOLUME /var/cache/tokenfleet
WORKDIR /home/tokenfleet
USER tokenfleet
CMD ["celery", "-A", "tokenfleet.workers.app", "worker", "--loglevel=INFO"]
