"""llama.cpp's server as a process of its own: `python -m twinlora.export.llama_server '{"model": …}'`.

Its threads would slow torch's in one process. Prints its address, and ends when its standard input is closed.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main() -> None:
    """Serve until the parent is gone."""
    import xllamacpp

    settings: dict[str, Any] = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.n_ctx, params.n_parallel, params.port = settings["context"], 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.cache_ram_mib, params.verbosity, params.warmup, params.n_gpu_layers = 0, 1, False, 0
    params.fit_params = False
    if settings["lora"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(settings["lora"], 1.0)]
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:  # what is wrong stands in the log before it
        sys.exit(str(error))
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    os._exit(0)  # nothing is to be saved, and its threads need not be waited for


if __name__ == "__main__":
    main()
