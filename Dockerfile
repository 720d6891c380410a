# Two images; `make docker-build` makes both:
#   docker build -t cifar-residual-job .                                      the job (the last stage)
#   docker build -t cifar-residual-job-tensorboard --target tensorboard .     TensorBoard, without TensorFlow
# Any Debian or Ubuntu with Python 3.11 to 3.13 serves as a base. For the CPU alone, 2 GB instead of 7:
#   docker build --build-arg BASE_IMAGE=docker.io/library/ubuntu:24.04 --build-arg REQUIREMENTS=requirements/cpu.lock .

# The host brings the GPU's driver, and Python packages bring CUDA 12.9, cuDNN, NCCL and ptxas. So NVIDIA's smallest
# flavour is enough: it tells the container runtime which drivers suit, and helps older ones along.
# Both bases by their whole names: podman completes none.
ARG BASE_IMAGE=docker.io/nvidia/cuda:12.9.1-base-ubuntu24.04
# TensorBoard has no use for CUDA.
ARG TENSORBOARD_BASE_IMAGE=docker.io/library/ubuntu:24.04
# Pinned and hashed by `make lock`.
ARG REQUIREMENTS=requirements/gpu.lock


# ---- TensorBoard
FROM ${TENSORBOARD_BASE_IMAGE} AS tensorboard
# The distribution's Python, and the authorities that gs:// trusts.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/*
# The packages come before all that changes more often.
COPY requirements/tensorboard.lock /opt/requirements.lock
# One instruction, so that pip and what it needs stay out of the image. A closed network may pass a pip.conf and
# certificate authorities as secrets, which leave no trace; without them both are absent.
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=secret,id=pip_conf \
    --mount=type=secret,id=ca_bundle \
    export PIP_CONFIG_FILE=/run/secrets/pip_conf PIP_CACHE_DIR=/var/cache/pip \
    && apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --only-binary :all: --require-hashes -r /opt/requirements.lock \
    && /opt/venv/bin/pip check \
    && /opt/venv/bin/pip uninstall -y pip \
    && apt-get purge -y --auto-remove python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/*
# gcsfs keeps listings for ever by default; a live TensorBoard must see new segments, however it lists. And it asks for
# each bucket's type by gRPC, for a minute each time where that is out of reach, though the type does not matter here.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FSSPEC_GCS='{"use_listings_cache": false}' \
    GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false
# Set by `make docker-build`.
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
# Nothing here uses the world-writable folders. This comes so late because podman's cache compares arguments in RUN
# alone: without one below them, the labels would stay those of an older build.
RUN chmod go-w /var/tmp /run/lock
# What registries and scanners show.
LABEL org.opencontainers.image.title="cifar-residual-job-tensorboard" \
      org.opencontainers.image.description="TensorBoard for runs in folders and in gs://, without TensorFlow" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}"
# Where runs are mounted; it only reads them.
WORKDIR /runs
# By number: Kubernetes' runAsNonRoot must see that it is not root. No entry in /etc/passwd is needed.
USER 10001:10001
# TensorBoard's default.
EXPOSE 6006
# The fast loader cannot read gs:// live. A container is reached from outside, so localhost alone would be no use.
# Arguments of the user's come behind, and a second --logdir replaces the first.
ENTRYPOINT ["tensorboard", "--load_fast=false", "--bind_all", "--logdir=/runs"]


# ---- The job's packages, each instruction as above
FROM ${BASE_IMAGE} AS packages
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/* \
    && chmod go-w /var/tmp /run/lock
# The one above all stages, which a stage must name to see.
ARG REQUIREMENTS
COPY ${REQUIREMENTS} /opt/requirements.lock
# TensorFlow's headers (440 MB) serve only to compile operations in C++.
RUN --mount=type=cache,target=/var/cache/pip \
    --mount=type=secret,id=pip_conf \
    --mount=type=secret,id=ca_bundle \
    export PIP_CONFIG_FILE=/run/secrets/pip_conf PIP_CACHE_DIR=/var/cache/pip \
    && apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --only-binary :all: --require-hashes -r /opt/requirements.lock \
    && /opt/venv/bin/pip check \
    && /opt/venv/bin/pip uninstall -y pip \
    && rm -r /opt/venv/lib/python3*/site-packages/tensorflow/include \
    && apt-get purge -y --auto-remove python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/*


# ---- The data, if it shall be in the image
FROM packages AS data
# For pods without any egress: --build-arg DATA=data bakes what `make data` has brought. The default, the sample,
# only gives COPY something that exists.
ARG DATA=job/data/sample
COPY ${DATA} /data
# The program, to verify every file.
COPY job /app/job
# Readable by the job's user, whatever the umask of the checkout.
RUN if [ "${DATA}" = job/data/sample ]; then rm /data/*; \
    else chmod -R a+rX /data && PYTHONPATH=/app /opt/venv/bin/python -m job data verify /data; fi


# ---- The job
FROM packages AS train
# The only places, with /tmp, that its user may write to. Each may be a mount, and the rest read-only.
RUN install -d -o 10001 -g 10001 /runs /data
# Nothing, or the verified files.
COPY --from=data /data /data
# Safe path: a module that lies in the working folder is never imported. Whatever libraries like to keep goes to /tmp,
# since the home may not be writable; 2 GiB at most of what CUDA compiles for GPUs that TensorFlow has no code for. GKE
# mounts the GPU's driver under /usr/local/nvidia.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    CUDA_CACHE_PATH=/tmp/cuda-cache \
    CUDA_CACHE_MAXSIZE=2147483648 \
    KERAS_HOME=/tmp/keras \
    XDG_CACHE_HOME=/tmp/cache \
    JOB_CACHE=/tmp/job-cache \
    JOB_SPOOL=/tmp/job-spool \
    JOB_DATA=/data \
    JOB_OUTPUT=/runs
# Runs can be named without their folder: evaluate NAME.
WORKDIR /runs
# No shell between: Python is PID 1 and receives SIGTERM.
ENTRYPOINT ["python", "-m", "job"]
CMD ["--help"]
# The embedded sample has a notice of its own, in job/data/sample.
COPY LICENSE NOTICE /app/
# The source comes late: a change rebuilds nothing above it.
COPY job /app/job
# As above, with a RUN below them.
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
ARG SOURCE=unknown
# The root file system may be read-only, so bytecode is made now. Readable whatever the umask of the checkout.
RUN chmod -R a+rX /app && python -m compileall -q /app/job
# A run records of which source it was trained.
ENV JOB_REVISION=${REVISION}
LABEL org.opencontainers.image.title="cifar-residual-job" \
      org.opencontainers.image.description="Resumable batch training of ResNet and PlainNet on CIFAR-10" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}"
USER 10001:10001
