"""cq-export: write a CQ file's weights back in stock GGUF types (F16, F32, Q8_0), for llama.cpp."""

from __future__ import annotations

import sys
from pathlib import Path

from pyggml_bridge.cli.common import ArgumentParser, run_main
from pyggml_bridge.export import TYPES, export
from pyggml_bridge.output import check_writable
from pyggml_bridge.reader import GGUFFile
from pyggml_bridge.stock import differences


def main() -> None:
    """Entry point."""
    run_main(_command)


def _command() -> None:
    parser = ArgumentParser(prog="cq-export", description=__doc__)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--out", required=True, metavar="M.gguf")
    parser.add_argument("--type", choices=sorted(TYPES), default="f16", help="type of the clustered weights (f16)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args()
    out = Path(args.out)
    check_writable(out, overwrite=args.overwrite)
    export(Path(args.file), out, TYPES[args.type])
    for what in differences(GGUFFile(out)):
        print(f"warning: llama.cpp {what}", file=sys.stderr)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
