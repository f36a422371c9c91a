# One image for training, evaluation and prediction: `make image IMAGE_FLAGS="--build-arg EXTRAS=gcs"`. Build arguments:
#   BASE         a Debian image with Python 3.11 or later and pip, at a full version; `make image BASE=…` pins it to the
#                digest that its registry reports
#   TORCH        cpu or cuda: which of requirements/torch-*.txt is installed; `make lock` writes more of these files
#   TORCH_INDEX  package index for torch; empty: pip's own index, as for all other packages
#   EXTRAS       gcs to support gs://; prepare or ray for fusion.prepare with Polars, or with both Polars and Ray
#   SOURCE       a URL for the label of that name
#   VERSION, REVISION, CREATED, BASE_DIGEST  for labels and run.json; `make image` takes them from the code, its commit
#                and the base
ARG BASE=docker.io/library/python:3.11.15-slim-bookworm

FROM ${BASE} AS packages
# The date of all files, see the Makefile. Another date makes all layers be built again.
ARG SOURCE_DATE_EPOCH
# A file whose hash is not in requirements/ stops the build. Bytecode is compiled below, independent of dates of files.
ENV PIP_REQUIRE_HASHES=1 PIP_ONLY_BINARY=:all: PIP_NO_DEPS=1 PIP_NO_COMPILE=1 \
    PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONHASHSEED=0
WORKDIR /src
RUN python3 -m venv --without-pip /opt/venv
COPY requirements/torch-*.txt requirements/
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m pip --python /opt/venv/bin/python install ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} \
    --requirement "requirements/torch-${TORCH}.txt"
COPY requirements/run.txt requirements/gcs.txt requirements/prepare.txt requirements/ray.txt requirements/
ARG EXTRAS=
RUN python3 -m pip --python /opt/venv/bin/python install --requirement "requirements/${EXTRAS:-run}.txt" \
 && python3 -m pip --python /opt/venv/bin/python check
# A fifth of the packages' size is tests and C++ headers, which are not needed.
RUN find /opt/venv -type d \( -name tests -o -path '*/torch/test' -o -path '*/torch/include' \) -prune -exec rm -r {} + \
 && find /opt/venv -path '*/torch/bin/*' -iname '*test*' -type f -delete
# `|| true`, because some packages contain files for other versions of Python, which do not compile.
RUN /opt/venv/bin/python -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/venv || true
# The command `fusion`, which pip would write if the code were installed as a package.
RUN printf '%s\n' '#!/opt/venv/bin/python' 'import sys' 'from fusion.__main__ import main' 'sys.exit(main())' \
    > /opt/venv/bin/fusion && chmod 755 /opt/venv/bin/fusion
COPY fusion /app/fusion
COPY jobs /app/jobs
# Containers run with a read-only root file system: without bytecode, each rank would compile the code again.
RUN /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /app

FROM ${BASE}
ARG SOURCE_DATE_EPOCH
# tini is PID 1: it forwards signals to the launcher, and reaps orphaned processes. Its version is not pinned, because
# Debian keeps only the newest one: a pin would break the build at the next security update. Files in which apt, ldconfig
# and useradd write the current time are removed, so that two builds are identical.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini \
 && groupadd --gid 10001 fusion \
 && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin fusion \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/*-old /var/cache/ldconfig/* /var/lib/dpkg/*-old \
    /var/log/apt /var/log/*.log /etc/passwd- /etc/shadow- /etc/group- /etc/gshadow-
COPY --from=packages /opt/venv /opt/venv
# The bill of materials with all packages of Debian and Python: /opt/venv/sbom.cdx.json
COPY requirements/sbom.py /opt/venv/sbom.py
RUN /opt/venv/bin/python /opt/venv/sbom.py > /opt/venv/sbom.cdx.json
COPY --from=packages /app /app
# These differ with every commit, so they come after all slow steps. There must be a RUN between them and the steps that
# use them; otherwise podman 4.3 takes ENV and LABEL of an earlier commit from its cache.
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=
ARG SOURCE=
ARG BASE
ARG BASE_DIGEST=
# The mode of /tmp: a tmpfs that is mounted there belongs to root and inherits the mode.
RUN install --directory --mode 1777 /cache
# NVIDIA_VISIBLE_DEVICES is not set, because the GPUs are chosen when the container is started. GKE mounts the driver at
# /usr/local/nvidia; elsewhere the container runtime mounts it at the usual paths.
ENV PATH=/opt/venv/bin:$PATH:/usr/local/nvidia/bin \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    PYTHONPATH=/app \
    FUSION_REVISION=${REVISION} \
    GOMP_SPINCOUNT=2000 \
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
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST}"
