"""Pull from the Hugging Face hub, which states the sha256 of each large file itself."""

from __future__ import annotations

import re
from pathlib import Path

from kmdx.weights.download import Progress, download
from kmdx.weights.fetched import Fetched
from kmdx.weights.registry import HubSource, Weight


def fetch(weight: Weight, source: HubSource, workspace: Path, progress: Progress) -> Fetched:
    """Download the file and check it against the hub's word; the client heeds ``$HF_ENDPOINT``."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(source.repository, source.file)
    metadata = get_hf_file_metadata(url)
    stated = metadata.etag if re.fullmatch(r"[0-9a-f]{64}", metadata.etag or "") else None
    path = workspace / Path(source.file).name
    sha256 = download(url, path, progress, bytes=metadata.size, sha256=stated)
    return Fetched(path, sha256, known=stated is not None)
