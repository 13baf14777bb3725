# The submission's image: CUDA, the pinned requirements and, under models/, the weights.
# Build it where models/ is filled (kmdx models pull leaderboard_c); at run time no network is needed.
FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive \
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
COPY --chown=aicrowd:aicrowd requirements.txt .
RUN python3 -m venv .venv && pip install --requirement requirements.txt

COPY --chown=aicrowd:aicrowd . .
RUN pip install --no-deps --editable . && kmdx ensembles

CMD ["python", "-m", "my_submission.aicrowd_wrapper"]
