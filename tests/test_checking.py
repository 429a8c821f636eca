"""A slip of the keyboard is answered at once: before torch is imported, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

OF_A_RUN = {
    "--data=nowhere": "no such file or folder: nowhere",
    f"--data={'a' * 300}": "no such file or folder: aaa",
    "--data=~nobody-at-all/text": "no such file or folder: ~nobody-at-all/text",
    "--members=x9": "cannot read members 'x9'",
    "--optimizer=adamv": "did you mean 'adamw'?",
    "--base-optimizer=adamv": "no optimizer named 'adamv'",
    "--optimizer=ars:loss=1": "'ars' has no setting 'loss'",
    "--gate=clip:limt=1": "'clip' has no setting 'limt'",
    "--strategy=progresive": "did you mean 'progressive'?",
    "--eval=blu": "did you mean 'bleu'?",
    "--tracker=wand": "did you mean 'wandb'?",
}
OF_A_MEMBER = {
    "evaluate d9": "no member 'd9' in checkpoints",
    "evaluate . --eval blu": ". is not a model directory",
    "evaluate member --eval blu": "did you mean 'bleu'?",
    "evaluate best": "no best member chosen",
    "grow d9 --to d10": "no member 'd9' in checkpoints",
    "grow member --to d10 --strategy progresive": "did you mean 'progressive'?",
    "export d9": "no member 'd9' in checkpoints",
    "export member --format onx": "did you mean 'onnx'?",
    "serve d9": "no member 'd9' in checkpoints",
    "serve member --engine vlm": "did you mean 'vllm'?",
}
SLIPS = {
    f"{command} {slip}": words for command in ("run", "plan") for slip, words in OF_A_RUN.items()
}
SLIPS |= OF_A_MEMBER


def test_a_slip_is_answered_before_torch_is_imported(tmp_path: Path) -> None:
    code = """
import json, sys
from contextlib import redirect_stderr
from io import StringIO
from ars_kit.cli import main

said, slips = {}, json.loads(sys.argv[1])
for slip in slips:
    sys.argv, stream = ["arskit", *slip.split()], StringIO()
    with redirect_stderr(stream):
        try:
            main()
        except SystemExit as ended:
            said[slip] = [ended.code, stream.getvalue(), "torch" in sys.modules]
print(json.dumps(said))
"""
    (tmp_path / "member").mkdir()
    (tmp_path / "member" / "config.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(SLIPS))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    for slip, words in SLIPS.items():
        exit_code, line, torch_is_there = said[slip]
        assert words in line
        assert exit_code in {3, 4}
        assert line.count("\n") == 1
        assert not torch_is_there, slip
