"""cq-info: what a GGUF file holds: header, tensor types, bits per weight, provenance."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pyggml_bridge.cli.common import ArgumentParser, print_json, run_main
from pyggml_bridge.format import Key
from pyggml_bridge.measure.sizes import bits_per_weight, tensor_sizes
from pyggml_bridge.reader import GGUFFile, StringArray

MAX_SHOWN = 60


def main() -> None:
    """Entry point."""
    run_main(_command)


def _command() -> None:
    parser = ArgumentParser(prog="cq-info", description=__doc__)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    args = parser.parse_args()
    file = GGUFFile(args.file)
    if args.json:
        print_json(describe(file))
    else:
        _print(file)


def describe(file: GGUFFile) -> dict[str, Any]:
    """The document of --json. Long strings and lists of the metadata are shown by their lengths."""
    bpw, bpw_total = bits_per_weight(file)
    return {
        "file": str(file.path),
        "bytes": file.size,
        "architecture": file.metadata.get(Key.GENERAL_ARCHITECTURE),
        "bpw": bpw,
        "bpw_total": bpw_total,
        "metadata": {key: _shorten(value) for key, value in file.metadata.items()},
        "tensors": [
            {"name": size.name, "type": size.type, "shape": list(size.shape), "bytes": size.nbytes, "bpw": size.bpw}
            for size in tensor_sizes(file)
        ],
    }


def _shorten(value: Any) -> Any:
    if isinstance(value, list | StringArray):
        return f"[{len(value)} values]" if len(value) > 16 else list(value)
    if isinstance(value, str) and len(value) > MAX_SHOWN:
        return value[: MAX_SHOWN - 1] + "…" if "\n" not in value else f"[{len(value)} characters]"
    return value


def _print(file: GGUFFile) -> None:
    info = describe(file)
    print(f"{info['file']}: {info['bytes'] / 1e6:.1f} MB, {info['architecture']}")
    print(f"{info['bpw']:.3f} bits per weight without embeddings and head, {info['bpw_total']:.3f} over the whole file")
    types = Counter(tensor["type"] for tensor in info["tensors"])
    print("types: " + ", ".join(f"{count} {kind}" for kind, count in types.most_common()))
    print("\nmetadata")
    for key, value in info["metadata"].items():
        print(f"  {key} = {value}")
    print("\ntensors")
    for tensor in info["tensors"]:
        shape = " x ".join(map(str, tensor["shape"]))
        print(f"  {tensor['name']:40} {tensor['type']:5} {shape:>22} {tensor['bpw']:7.3f} bpw")


if __name__ == "__main__":
    main()
