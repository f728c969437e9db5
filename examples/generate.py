"""Continue a text, word by word.

python examples/generate.py model.cq.gguf "Once upon a time"
"""

import sys

from pyggml_bridge import LLM


def main(path: str, prompt: str) -> None:
    """Print the prompt and up to 64 tokens after it."""
    llm = LLM(path, n_ctx=2048)
    print(prompt, end="", flush=True)
    for text in llm.generate(prompt, max_tokens=64, temperature=0.7, seed=0):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
