"""Convert a Hugging Face checkpoint (a directory or a hub id) and continue a text with the result.

    python examples/convert_and_run.py HuggingFaceTB/SmolLM2-135M smollm2.cq.gguf "Once upon a time" --bits 4

What follows the prompt are options of cq-convert. Needs the converter: pip install '.[convert]'
"""

import sys

from codequant_converter.cli import parser, settings_of
from codequant_converter.pipeline import convert

from pyggml_bridge import LLM


def main(model: str, out: str, prompt: str, *options: str) -> None:
    """Write the file `out` and print 32 tokens after the prompt."""
    report = convert(settings_of(parser().parse_args([model, "--out", out, *options])))
    print(f"{out}: {report.document()['bpw']:.2f} bits per weight")
    print(prompt + "".join(LLM(out).generate(prompt, max_tokens=32, temperature=0)))


if __name__ == "__main__":
    main(*sys.argv[1:])
