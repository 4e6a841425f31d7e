# Flows for a Prefect work pool whose workers start containers: Prefect, flows, blocks and the SDKs of the chosen clouds; no torch.
# Build:  docker build -f docker/flow-runner.Dockerfile --build-arg EXTRAS="aws kubernetes" .
ARG BASE_IMAGE=python:3.12.12-slim-bookworm

FROM ${BASE_IMAGE} AS code
RUN --mount=type=bind,source=docker/flow-runner-build-requirements.txt,target=/run/requirements.txt \
    --mount=type=cache,id=trainyard-pip,target=/var/cache/pip,sharing=locked \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    set -eu; \
    export PIP_CACHE_DIR=/var/cache/pip PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore; \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    python -m pip install --require-hashes --no-deps --target /build -r /run/requirements.txt
COPY pyproject.toml README.md LICENSE /source/
COPY trainer /source/trainer
COPY blocks /source/blocks
COPY flows /source/flows
# As a wheel, so that the version and the entry points are there, too; by what is pinned above, without a look at the network.
RUN set -eu; \
    export PYTHONPATH=/build PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore; \
    python -m pip wheel --no-deps --no-index --no-build-isolation --wheel-dir /wheels /source; \
    python -m pip install --no-deps --no-index --no-compile --target /app /wheels/*.whl; \
    chmod -R u=rwX,go=rX /app; \
    python -m compileall -q --invalidation-mode unchecked-hash /app

FROM ${BASE_IMAGE}
# Of aws, gcp, azure, kubernetes; several with spaces between them.
ARG EXTRAS=
RUN --mount=type=bind,source=docker,target=/run/docker \
    --mount=type=cache,id=trainyard-pip,target=/var/cache/pip,sharing=locked \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    set -eu; \
    export PIP_CACHE_DIR=/var/cache/pip PIP_NO_COMPILE=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore; \
    export TMPDIR=/var/cache/pip/tmp; \
    rm -rf "$TMPDIR"; \
    mkdir "$TMPDIR"; \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    set -- -r /run/docker/flow-runner-requirements.txt; \
    for extra in $EXTRAS; do set -- "$@" -r "/run/docker/flow-runner-$extra-requirements.txt"; done; \
    python -m venv --without-pip /opt/flow-runner; \
    python -m pip --python /opt/flow-runner/bin/python install --no-deps --require-hashes "$@"; \
    python -c 'import pathlib, shutil; [shutil.rmtree(found) for found in [*pathlib.Path("/opt/flow-runner").rglob("tests")]]'; \
    python -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/flow-runner/lib || true; \
    rm -rf "$TMPDIR"

# Whoever the user is, there is a home to write to.
ENV PATH=/opt/flow-runner/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp
WORKDIR /app
USER 1000:1000
STOPSIGNAL SIGTERM
# No entry point: work pools give the whole command, this one by default.
CMD ["prefect", "flow-run", "execute"]
COPY --from=code /app /app

ARG VERSION=
ARG REVISION=
LABEL org.opencontainers.image.title="Trainyard flow runner" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
