# The submission's image: CUDA, the pinned requirements and, under models/, the weights.
# Build it where models/ is filled (kmdx models pull leaderboard_c); at run time no network is needed.
#
# CUDA 13 needs driver 580 or newer on the host. For an older one (525 or newer), write CUDA=12.8.1 here: torch
# and ONNX Runtime are then those in requirements-cuda12.txt. AIcrowd builds the image without arguments.
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-cudnn-runtime-ubuntu24.04
ARG CUDA

# Without a UTF-8 locale, Python could not write songs' names to a log.
ENV LANG=C.UTF-8 \
    DEBIAN_FRONTEND=noninteractive \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    HF_HUB_OFFLINE=1

COPY apt.txt /tmp/apt.txt
RUN apt-get update \
    && xargs --arg-file /tmp/apt.txt apt-get install --yes --no-install-recommends \
    && rm -rf /var/lib/apt/lists/*

RUN groupadd --gid 1001 aicrowd \
    && useradd --create-home --uid 1001 --gid 1001 --shell /bin/bash aicrowd
USER aicrowd
WORKDIR /home/aicrowd

ENV PATH=/home/aicrowd/.venv/bin:$PATH
COPY --chown=aicrowd:aicrowd requirements.txt requirements-cuda12.txt ./
RUN python3.12 -m venv .venv \
    && if [ "${CUDA%%.*}" = 12 ]; then \
        sed --in-place '/^torch==/d; /^onnxruntime-gpu==/d' requirements.txt \
        && cat requirements-cuda12.txt >> requirements.txt; \
    fi \
    && pip install --requirement requirements.txt

COPY --chown=aicrowd:aicrowd . .
RUN pip install --no-deps --editable . && kmdx ensembles

CMD ["python", "-m", "my_submission.aicrowd_wrapper"]
