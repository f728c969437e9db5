"""Which continuation of a text does the model find likelier?

python examples/score.py model.cq.gguf "The capital of France is" " Paris." " Rome."
"""

import sys

from pyggml_bridge import LLM


def log_probability(llm: LLM, prompt: str, continuation: str) -> float:
    """Natural log-probability of the continuation after the prompt."""
    n_prompt, ids = len(llm.tokenize(prompt)), llm.tokenize(prompt + continuation)
    logprobs = llm.logprobs(ids)  # row i: of the token after ids[i]
    return float(sum(logprobs[i - 1, ids[i]] for i in range(max(n_prompt, 1), len(ids))))


def main(path: str, prompt: str, *continuations: str) -> None:
    """Print the continuations, the likeliest first."""
    llm = LLM(path)
    scores = {text: log_probability(llm, prompt, text) for text in continuations}
    for text, score in sorted(scores.items(), key=lambda item: -item[1]):
        print(f"{score:9.3f}  {text!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
