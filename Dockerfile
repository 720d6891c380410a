# Two images of one file:
#   docker build -t cifar-residual-job .                                               the job
#   docker build -t cifar-residual-job-tensorboard --target tensorboard .              TensorBoard, without TensorFlow
# Any Debian or Ubuntu with Python 3.11 to 3.13 serves as a base. For the CPU alone:
#   docker build --build-arg BASE_IMAGE=ubuntu:24.04 --build-arg REQUIREMENTS=requirements-cpu.lock .

# The host brings the GPU's driver, and CUDA 12.9, cuDNN, NCCL and ptxas come as Python packages. So NVIDIA's smallest
# flavour is enough: it tells the container runtime which drivers suit, and helps older ones.
ARG BASE_IMAGE=nvidia/cuda:12.9.1-base-ubuntu24.04
ARG TENSORBOARD_BASE_IMAGE=ubuntu:24.04
ARG REQUIREMENTS=requirements-gpu.lock


FROM ${TENSORBOARD_BASE_IMAGE} AS tensorboard
# The distribution's Python, and the authorities that gs:// needs. World-writable folders that nothing here uses close.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/* \
    && chmod go-w /var/tmp /run/lock
# The packages come before all that changes more often. One instruction, so that pip and what it brings stay behind.
# A closed network may pass its pip.conf and certificate authorities as secrets; without them both are absent.
COPY requirements-tensorboard.lock /opt/requirements.lock
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
# gcsfs remembers listings for ever by default: a live TensorBoard would never see a new segment.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FSSPEC_GCS='{"use_listings_cache": false}'
LABEL org.opencontainers.image.title="cifar-residual-job TensorBoard" \
      org.opencontainers.image.description="TensorBoard for folders and gs://, without TensorFlow" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /runs
USER 10001:10001
EXPOSE 6006
# The fast loader cannot read gs:// live. A container is reached from outside, so localhost alone would be no use.
ENTRYPOINT ["tensorboard", "--load_fast=false", "--bind_all"]
CMD ["--logdir=/runs"]


FROM ${BASE_IMAGE} AS packages
# As above, for the job.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/log/* \
    && chmod go-w /var/tmp /run/lock
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


FROM packages AS data
# For pods without any egress: --build-arg DATA=data bakes the files that `make data` brings. The default, the embedded
# sample, only gives COPY something that exists.
ARG DATA=job/sample
COPY ${DATA} /data
COPY job /app/job
RUN if [ "${DATA}" = job/sample ]; then rm /data/*; else cd /app && /opt/venv/bin/python -m job data verify /data; fi


FROM packages AS train
# The only places of an image that its user may write to; any of them may be a mount.
RUN install -d -o 10001 -g 10001 /runs /data
COPY --from=data /data /data
# Safe path: a module that lies in the working folder is never imported. Whatever libraries like to keep goes to /tmp,
# also with a home that cannot be written. GKE mounts the GPU's driver under /usr/local/nvidia.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    CUDA_CACHE_PATH=/tmp/cuda-cache \
    KERAS_HOME=/tmp/keras \
    XDG_CACHE_HOME=/tmp/cache \
    JOB_CACHE=/tmp/job-cache \
    JOB_SPOOL=/tmp/job-spool \
    JOB_DATA=/data \
    JOB_OUTPUT=/runs
COPY LICENSE NOTICE /app/
COPY job /app/job
# The root file system may be read-only, so bytecode is made now.
RUN python -m compileall -q /app/job
# Last, because they change with every commit.
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="cifar-residual-job" \
      org.opencontainers.image.description="Resumable batch training of ResNet and PlainNet on CIFAR-10" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# By number: Kubernetes' runAsNonRoot must see that it is not root. No entry in /etc/passwd is needed.
USER 10001:10001
# Runs can be named without their folder: evaluate NAME.
WORKDIR /runs
# No shell between: Python is PID 1 and receives SIGTERM.
ENTRYPOINT ["python", "-m", "job"]
CMD ["--help"]
