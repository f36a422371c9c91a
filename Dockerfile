# One image trains, evaluates and predicts: `make image IMAGE_FLAGS="--build-arg EXTRAS=gcs"`. Build arguments:
#   BASE         a Debian with Python 3.11 or later and pip, pinned to a full version. To pin its content as well, give the
#                digest that your registry shows: registry.example.com/python:3.11.15-slim-bookworm@sha256:…
#   TORCH_INDEX  where torch alone comes from; empty: from pip's own index, like all the rest. For CPUs every version is
#                one of constraints.txt; another index brings NVIDIA's libraries in the versions that its torch asks for.
#   EXTRAS       extras of pyproject.toml, by commas: gcs for gs://
#   SOURCE       a URL for the label of that name
#   VERSION, REVISION, CREATED  for labels and run.json; `make image` takes them from the code and its commit
ARG BASE=docker.io/library/python:3.11.15-slim-bookworm

FROM ${BASE} AS packages
ENV PIP_CONSTRAINT=/src/constraints.txt PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python3 -m venv --without-pip /opt/venv
COPY constraints.txt pyproject.toml ./
# torch alone comes from TORCH_INDEX, all else from pip's own index: neither can slip in a package of the other.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m pip --python /opt/venv/bin/python install --no-deps ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch
ARG EXTRAS=
RUN python3 -c "import os, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = [project['optional-dependencies'][name] for name in os.environ.get('EXTRAS', '').split(',') if name]; \
print(*sum(extras, project['dependencies']), sep='\n')" > requirements.txt \
 && python3 -m pip --python /opt/venv/bin/python install --requirement requirements.txt
# A fifth of the packages' size is their own tests and C++ headers, which nothing here reads.
RUN find /opt/venv -type d \( -name tests -o -path '*/torch/test' -o -path '*/torch/include' \) -prune -exec rm -r {} + \
 && find /opt/venv -path '*/torch/bin/*' -iname '*test*' -type f -delete
COPY fusion /app/fusion
COPY jobs /app/jobs
# The root file system is read-only where it runs: what is not compiled here would be compiled again by each rank.
RUN /opt/venv/bin/python -m compileall -q /app

FROM ${BASE}
# tini is PID 1: it hands signals to the launcher, and buries what a killed process leaves behind. Its version is not
# pinned, because Debian keeps no older ones: a pin would break the build at the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 fusion \
 && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin fusion
COPY --from=packages /opt/venv /opt/venv
COPY --from=packages /app /app
# Below everything that takes time, as they differ with every commit. A RUN must stand between them and what uses them:
# without one, podman 4.3 takes ENV and LABEL of an earlier commit from its cache.
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=
ARG SOURCE=
# As open as /tmp: a tmpfs that is mounted there takes over its mode, and belongs to root.
RUN install --directory --mode 1777 /cache
# NVIDIA_VISIBLE_DEVICES is left out: whoever runs the container says which GPUs it may see.
# /usr/local/nvidia is where GKE mounts the driver, which elsewhere the container runtime puts onto the usual paths.
ENV PATH=/opt/venv/bin:$PATH:/usr/local/nvidia/bin \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    PYTHONPATH=/app \
    FUSION_REVISION=${REVISION} \
    GOMP_SPINCOUNT=1000 \
    KMP_BLOCKTIME=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONFAULTHANDLER=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    XDG_CACHE_HOME=/cache \
    MPLCONFIGDIR=/cache/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /app
USER 10001:10001
ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "fusion.launch", "--help"]
LABEL org.opencontainers.image.title="fusion" \
      org.opencontainers.image.description="Trains multi-modal fusion models that predict product prices from precomputed embeddings" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}"
