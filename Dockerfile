# One image trains, evaluates and predicts: `make image IMAGE_FLAGS="--build-arg EXTRAS=gcs"`. Build arguments:
#   BASE         a Debian with Python 3.11 or later and pip, pinned to a full version: `make image BASE=…`, which pins it
#                to the digest that the registry shows at that moment
#   TORCH        cpu or cuda: which of requirements/torch-*.txt is installed; `make lock` writes more of these files
#   TORCH_INDEX  where that comes from; empty: from pip's own index, like all the rest
#   EXTRAS       gcs for gs://
#   SOURCE       a URL for the label of that name
#   VERSION, REVISION, CREATED, BASE_DIGEST  for labels and run.json; `make image` takes them from the code, its commit
#                and the base
ARG BASE=docker.io/library/python:3.11.15-slim-bookworm

FROM ${BASE} AS packages
# The date of all files, see the Makefile: layers that were made with another one are made again.
ARG SOURCE_DATE_EPOCH
# A file whose hash is not in requirements/ stops the build. Bytecode is compiled below, for files of any date.
ENV PIP_REQUIRE_HASHES=1 PIP_ONLY_BINARY=:all: PIP_NO_DEPS=1 PIP_NO_COMPILE=1 \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONHASHSEED=0
WORKDIR /src
RUN python3 -m venv --without-pip /opt/venv
COPY requirements/torch-*.txt requirements/
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m pip --python /opt/venv/bin/python install ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} \
    --requirement "requirements/torch-${TORCH}.txt"
COPY requirements/run.txt requirements/gcs.txt requirements/
ARG EXTRAS=
RUN python3 -m pip --python /opt/venv/bin/python install --requirement "requirements/${EXTRAS:-run}.txt" \
 && python3 -m pip --python /opt/venv/bin/python check
# A fifth of the packages' size is their own tests and C++ headers, which nothing here reads.
RUN find /opt/venv -type d \( -name tests -o -path '*/torch/test' -o -path '*/torch/include' \) -prune -exec rm -r {} + \
 && find /opt/venv -path '*/torch/bin/*' -iname '*test*' -type f -delete
# Some packages bring files for other versions of Python, which do not compile.
RUN /opt/venv/bin/python -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/venv || true
COPY fusion /app/fusion
COPY jobs /app/jobs
# The root file system is read-only where it runs: what is not compiled here would be compiled again by each rank.
RUN /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /app

FROM ${BASE}
ARG SOURCE_DATE_EPOCH
# tini is PID 1: it hands signals to the launcher, and buries what a killed process leaves behind. Its version is not
# pinned, because Debian keeps no older ones: a pin would break the build at the next security update. What apt, ldconfig
# and useradd note with the time of day is removed, so that two builds are the same.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini \
 && groupadd --gid 10001 fusion \
 && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin fusion \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/* /var/lib/dpkg/*-old \
    /var/log/apt /var/log/*.log /etc/passwd- /etc/shadow- /etc/group- /etc/gshadow-
COPY --from=packages /opt/venv /opt/venv
# What the image is made of, of Debian and of Python: /opt/venv/sbom.cdx.json
COPY requirements/sbom.py /opt/venv/sbom.py
RUN /opt/venv/bin/python /opt/venv/sbom.py > /opt/venv/sbom.cdx.json
COPY --from=packages /app /app
# Below everything that takes time, as they differ with every commit. A RUN must stand between them and what uses them:
# without one, podman 4.3 takes ENV and LABEL of an earlier commit from its cache.
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=
ARG SOURCE=
ARG BASE
ARG BASE_DIGEST=
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
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}"
