# The one image of every pipeline step, with the code inside: no step installs anything when it runs.
#
#   docker build -t salun .
#
# CPU only: --build-arg TORCH_INDEX_URL=<PyTorch's index of CPU builds>. Left empty, pip's own index decides;
# its Linux builds of torch bring their CUDA libraries along, so the default base runs on GPU nodes too.
# Another base: --build-arg BASE_IMAGE=nvidia/cuda:12.8.1-base-ubuntu24.04, or any Debian or Ubuntu; Python is
# added where the base has none of 3.11 or newer.
# The versions that were tested, or wheels from a folder: --build-context pip=DIR with constraints.txt, *.whl.
# An index that needs a login or a private CA: --secret id=pip.conf,src=FILE and --secret id=ca.crt,src=FILE.

ARG BASE_IMAGE=python:3.11-slim

FROM scratch AS pip
# An empty stage that `--build-context pip=DIR` replaces.

FROM ${BASE_IMAGE} AS base
ENV DEBIAN_FRONTEND=noninteractive
RUN python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || { apt-get update \
         && apt-get install -y --no-install-recommends ca-certificates python3 \
         && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
         && python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }

FROM base AS builder
RUN python3 -c 'import ensurepip' \
    || { apt-get update && apt-get install -y --no-install-recommends python3-venv; }
RUN python3 -m venv /opt/tools && python3 -m venv --without-pip /opt/venv
WORKDIR /src
COPY pyproject.toml ./
RUN python3 -c "import pathlib, tomllib; \
document = tomllib.load(open('pyproject.toml', 'rb')); \
project = document['project']; \
lists = {'run': project['dependencies'], \
         'torch': [line for line in project['dependencies'] if line.startswith('torch')], \
         'kfp': [line for line in project['optional-dependencies']['kfp'] if line.startswith('kfp>')], \
         'diffusion': project['optional-dependencies']['diffusion'], \
         'tools': document['build-system']['requires']}; \
[pathlib.Path(name + '.txt').write_text('\n'.join(lines)) for name, lines in lists.items()]"
ARG TORCH_INDEX_URL=""
# With kfp's client and its 25 packages: the cluster's schedule submits from this image.
RUN --mount=type=bind,from=pip,target=/pip \
    --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.crt \
    set -eu; \
    if [ -s /run/secrets/pip.conf ]; then export PIP_CONFIG_FILE=/run/secrets/pip.conf; fi; \
    if [ -s /run/secrets/ca.crt ]; then export PIP_CERT=/run/secrets/ca.crt; fi; \
    if [ -s /pip/constraints.txt ]; then export PIP_CONSTRAINT=/pip/constraints.txt; fi; \
    export PIP_FIND_LINKS=/pip PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1; \
    pip="/opt/tools/bin/pip --python /opt/venv/bin/python"; \
    if [ -n "$TORCH_INDEX_URL" ]; then $pip install --index-url "$TORCH_INDEX_URL" -r torch.txt; fi; \
    $pip install -r run.txt -r kfp.txt -r diffusion.txt; \
    /opt/tools/bin/pip install wheel -r tools.txt
COPY LICENSE README.md ./
# Without lab/: the verbs of the laboratory are absent here.
COPY salun_core salun_core
RUN /opt/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
    && /opt/tools/bin/pip --python /opt/venv/bin/python install --no-deps --no-index /dist/*.whl

FROM base AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="salun" \
      org.opencontainers.image.description="Saliency unlearning (SalUn): every step of its pipelines" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The root file system is read-only in the cluster: whatever a library wants to write goes to /tmp. LOGNAME
# serves libraries that ask for the user's name, for the uid has no entry in /etc/passwd.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    LOGNAME=salun \
    MPLBACKEND=Agg \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    XDG_CACHE_HOME=/tmp/cache
COPY --from=builder /opt/venv /opt/venv
WORKDIR /opt/salun
COPY LICENSE ./
COPY components components
COPY pipelines pipelines
USER 10001:10001
ENTRYPOINT []
CMD ["salun", "--help"]
