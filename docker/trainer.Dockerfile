# The trainer, one image for every platform. CUDA's libraries come with torch's wheels, the driver from the host.
# Layers in the order of change: base, dependencies, our code. Without the `syntax` line, so that nothing but the base is pulled.
# Any image with Python 3.11 to 3.13 and pip serves as base; name@sha256:... pins it.
ARG BASE_IMAGE=python:3.12.12-slim-bookworm

# Compiled by content, so that the same sources give the same files, and a start without a writable disk is quick.
FROM ${BASE_IMAGE} AS code
COPY trainer /app/trainer
RUN chmod -R u=rwX,go=rX /app && python -m compileall -q --invalidation-mode unchecked-hash /app

FROM ${BASE_IMAGE}
# Unverified: the address of an index with torch's CPU wheels makes an image without CUDA. Those wheels have other hashes; none is checked.
ARG TORCH_INDEX=
# Secret `ca`: the certificates that the build's network wants, where a proxy looks into TLS. Of what pip needs while it works nothing stays,
# nor do the packages' own tests. Some files of packages are templates, or for other Pythons, and do not compile.
RUN --mount=type=bind,source=docker/trainer-requirements.txt,target=/run/requirements.txt \
    --mount=type=cache,id=trainyard-pip,target=/var/cache/pip,sharing=locked \
    --mount=type=secret,id=ca,target=/run/secrets/ca \
    set -eu; \
    export PIP_CACHE_DIR=/var/cache/pip PIP_NO_COMPILE=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore; \
    export TMPDIR=/var/cache/pip/tmp; \
    rm -rf "$TMPDIR"; \
    mkdir "$TMPDIR"; \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi; \
    python -m venv --without-pip /opt/trainer; \
    install() { python -m pip --python /opt/trainer/bin/python install --no-deps "$@"; }; \
    if [ -z "$TORCH_INDEX" ]; then \
        install --require-hashes -r /run/requirements.txt; \
    else \
        sed '/^\(torch\|torchvision\|triton\|nvidia-.*\|cuda-.*\)==/,/[^\\]$/d' /run/requirements.txt >"$TMPDIR/requirements.txt"; \
        install --require-hashes -r "$TMPDIR/requirements.txt"; \
        PIP_INDEX_URL="$TORCH_INDEX" install $(sed -n 's/^\(torch\(vision\)\?==[^ ]*\).*/\1/p' /run/requirements.txt); \
    fi; \
    python -c 'import pathlib, shutil; [shutil.rmtree(found) for found in [*pathlib.Path("/opt/trainer").rglob("tests")]]'; \
    python -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/trainer/lib || true; \
    rm -rf "$TMPDIR"

ENV PATH=/opt/trainer/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
# A number, since Kubernetes cannot tell of a name that it is not root's.
USER 1000:1000
STOPSIGNAL SIGTERM
# SageMaker adds `train`, others their arguments. -P: no module of the folder that it happens to start in.
ENTRYPOINT ["python", "-P", "-m", "trainer"]
COPY --from=code /app /app

ARG VERSION=
ARG REVISION=
ARG SOURCE_HASH=
ARG CONTRACT_VERSION=
LABEL org.opencontainers.image.title="Trainyard trainer" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      io.trainyard.source-hash="${SOURCE_HASH}" \
      io.trainyard.contract-version="${CONTRACT_VERSION}"
