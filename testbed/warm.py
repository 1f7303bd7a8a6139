"""What a process does slowly the first time, done once in the server that all ranks are forked
from.

Reading a configuration builds Hydra's parser tables, and drawing a plot reads fonts: half a second
a rank.
"""

import json
import tempfile
from pathlib import Path

from dnt_scale import config
from dnt_scale.record import plots
from testbed.run import tiny

config.load(tiny(Path("data"), Path("run")))
with tempfile.TemporaryDirectory() as folder:
    points = [
        {
            "step": step,
            "tokens": 512 * step,
            "train/loss": 5.0 - step,
            "grad_norm": 1.0 + 8 * step,
            "val/loss": 5.0,
        }
        for step in range(3)
    ]
    Path(folder, "metrics.jsonl").write_text("".join(f"{json.dumps(point)}\n" for point in points))
    plots.plot_run(Path(folder))
