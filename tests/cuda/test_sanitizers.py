"""The emulated kernels under the address and undefined-behaviour sanitizers, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CASES = (
    "test_linear.py::test_integers_of_every_tail[8-17213]",
    "test_linear.py::test_experts_multiply_their_slots[90-True]",
    "test_linear.py::test_q8_0[True-131-96-4]",
    "test_linear.py::test_float_matrices[67-33-66-float16]",
    "test_rows.py::test_embed",
    "test_linear.py::test_every_part_of_a_row_has_its_own_matrix[4-17213]",
    "test_linear.py::test_every_part_of_a_row_has_its_own_float_matrix[float16-3]",
    "test_rows.py::test_rms_norm",
    "test_rows.py::test_quantize_is_the_formats_quantizer",
    "test_rows.py::test_rope",
    "test_rows.py::test_norm_with_its_quantized_form[5184-8]",
    "test_rows.py::test_norm_of_the_sum_of_experts[2048-8-True]",
    "test_rows.py::test_swiglu_with_its_quantized_form",
    "test_rows.py::test_heads_on_their_way_to_attention",
    "test_linear.py::test_layers_of_one_launch[heights0-67-17213]",
    "test_linear.py::test_any_size_of_a_team_gives_the_integers[33-576-64-17213]",
    "test_rows.py::test_swiglu",
    "test_rows.py::test_combine_and_select",
    "test_rows.py::test_copy_columns",
    "test_route.py::test_routing[Scoring.SIGMOID-False-5-3-3]",
    "test_route.py::test_grouping_of_uneven_slots[random-255]",
    "test_route.py::test_nan_logits_choose_experts_that_exist",
    "test_route.py::test_only_experts_of_the_best_groups[40-33-6-True]",
    "test_route.py::test_sparsemixer_chooses_one_after_the_other[16-2-0.01]",
    "test_attention.py::test_attention[90-20-33-1-81]",
    "test_attention.py::test_attention[200-1-33-2-81]",
    "test_attention.py::test_attention[61-17-0-1-512]",
    "test_attention.py::test_decoding[300-65-12-heads1]",
    "test_attention.py::test_latent_attention[130-1-0-3-heads0-widths0]",
    "test_attention.py::test_latent_attention[200-1-33-2-heads1-widths1]",
    "test_attention.py::test_latent_attention[61-17-0-1-heads2-widths2]",
    "test_attention.py::test_latent_attention[3-1-0-5-heads3-widths3]",
)


def sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, everything emulated compiled with the sanitizers."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "CQ_EMULATE_FLAGS": "-O0 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])


def test_no_kernel_reads_or_computes_what_it_must_not() -> None:
    done = sanitized("-m", "pytest", "-p", "no:cacheprovider", *(str(HERE / case) for case in CASES))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_sanitizers_see_a_read_past_shared_memory_and_an_overflow() -> None:
    for kernel, message in (("overrun", "heap-buffer-overflow"), ("overflow", "signed integer overflow")):
        code = f"from tests.cuda.test_emulator import launch, np; launch('{kernel}', np.ones(320, np.int32))"
        done = sanitized("-c", code)
        assert done.returncode != 0 and message in done.stderr, done.stderr
