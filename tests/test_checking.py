"""A slip of the keyboard is answered at once: before torch is imported, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SLIPS = {
    "--data=nowhere": "no such file or folder: nowhere",
    "--members=x9": "cannot read members 'x9'",
    "--optimizer=adamv": "did you mean 'adamw'?",
    "--base-optimizer=adamv": "no optimizer named 'adamv'",
    "--optimizer=ars:loss=1": "'ars' has no setting 'loss'",
    "--gate=clip:limt=1": "'clip' has no setting 'limt'",
    "--strategy=progresive": "did you mean 'progressive'?",
    "--eval=blu": "did you mean 'bleu'?",
    "--tracker=wand": "did you mean 'wandb'?",
}


def test_a_slip_is_answered_before_torch_is_imported(tmp_path: Path) -> None:
    code = """
import json, sys
from contextlib import redirect_stderr
from io import StringIO
from ars_kit.cli import main

said, slips = {}, json.loads(sys.argv[1])
for command in ("run", "plan"):
    for slip in slips:
        sys.argv, stream = ["arskit", command, slip], StringIO()
        with redirect_stderr(stream):
            try:
                main()
            except SystemExit as ended:
                said[f"{command} {slip}"] = [ended.code, stream.getvalue(), "torch" in sys.modules]
print(json.dumps(said))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(SLIPS))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for command in ("run", "plan"):
        for slip, words in SLIPS.items():
            exit_code, line, torch_is_there = said[f"{command} {slip}"]
            assert words in line
            assert exit_code in {3, 4}
            assert line.count("\n") == 1
            assert not torch_is_there, f"{command} {slip}"
