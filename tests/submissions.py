"""Submissions that do one thing each, written into folders as entrants would write them."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent, indent

WRAPPER = '''
import os
from pathlib import Path

import numpy as np
import soundfile

from my_submission.user_config import MySeparationModel


class AIcrowdWrapper:
    """An entrant's own wrapper."""

    def __init__(self):
        self.model = MySeparationModel()
        self.instruments = ["bass", "drums", "other", "vocals"]
        self.predictions = Path(os.environ["AICROWD_PUBLIC_SHARED_DIR"]) / "predictions"
        self.dataset = Path(os.environ["AICROWD_DATASET_DIR"])
        assert self.predictions.is_dir() and self.dataset.is_dir()

    def separate_music_file(self, name):
        mixture, rate = soundfile.read(self.dataset / name / "mixture.wav")
        stems, rates = self.model.separate_music_file(mixture, rate)
        (self.predictions / name).mkdir(exist_ok=True)
        for instrument in self.instruments:
            soundfile.write(self.predictions / name / f"{instrument}.wav", stems[instrument], rates[instrument])
        return True
'''

MODEL = """
import os, sys, time
import numpy as np

STEMS = ["bass", "drums", "other", "vocals"]


class MySeparationModel:
    def __init__(self):
        self.count = 0
        self.progress = None
        print("made")

    def separate_music_file(self, mixture, rate):
        self.count += 1
        stems = {name: weight * mixture for name, weight in zip(STEMS, (0.1, 0.2, 0.3, 0.4))}
{body}
        return stems, dict.fromkeys(stems, rate)
"""

FORKS = """
children = [os.fork() or (time.sleep(60), os._exit(0)) for _ in range(4)]
time.sleep(0.4)
for child in children:
    os.kill(child, 9)
    os.waitpid(child, 0)
"""

# A process in a session of its own whose parent has ended: below nobody in the tree of the submission.
DAEMON = """
import subprocess
subprocess.run("setsid sleep $KMDX_NAP & setsid sleep $KMDX_NAP & true", shell=True)
"""

BODIES = {
    "works": "",
    "sleeps": "time.sleep(600)",
    "loops in native code": "sum(range(10**12))",
    "takes memory": "self.hoard = np.ones(int(os.environ.get('KMDX_HOARD', 2 * 10**9)) // 8)\ntime.sleep(600)",
    "raises": "raise RuntimeError('out of ideas\\nand out of luck')",
    "returns NaN": "stems['drums'][7] = np.nan",
    "returns infinity": "stems['drums'][7] = -np.inf\nstems['vocals'][8] = np.nan",
    "returns lists": "stems['drums'][7] = np.nan\nstems = {name: stem.tolist() for name, stem in stems.items()}",
    "takes a moment": "time.sleep(0.3)",
    "forks": "self.hoard = np.ones(3 * 10**8 // 8)\n" + FORKS,
    "leaves processes behind": DAEMON + "time.sleep(float(os.environ['KMDX_STAYS']))",
    "leaves processes behind and crashes": DAEMON + "os.abort()",
    "talks": "for i in range(50):\n    self.progress(i, 50)\n    time.sleep(0.01)",
    "opens a socket": "import socket\nsocket.create_connection(('127.0.0.1', int(os.environ['KMDX_PORT'])), timeout=5).close()",
    "returns three stems": "del stems['bass']",
    "returns a wrong length": "stems['other'] = stems['other'][:-1]",
    "exits": "sys.exit(3)",
    "crashes": "os.abort()",
    "imports late": "if self.count == 2: import torch",
    "fails at its second song": "assert self.count != 2, 'no second song'",
}


def write(folder: Path, what: str, load: str = "") -> Path:
    """Write the submission that does ``what``; ``load`` is done when the model is made."""
    package = folder / "my_submission"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "aicrowd_wrapper.py").write_text(WRAPPER)
    body = indent(dedent(BODIES[what]), " " * 8)
    model = MODEL.replace("{body}", body).replace('print("made")', f'print("made"); {load or "pass"}')
    (package / "user_config.py").write_text(model)
    return folder
