/* AVX2 with FMA and F16C (Haswell, Zen and later). Bytes are multiplied by vpmaddubsw, unsigned by signed: the
 * magnitude of one factor times the other with its sign. Which is which: avx2_gemv.h, avx2_panel.h, multiply_i8 in
 * x86.h. */
#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#include <immintrin.h>
#endif
#include "isa/avx2_core.h"

const cq_kernels cq_kernels_avx2 = {"avx2",          has_avx2,     gemv,       PANEL_ROWS,      PANEL_HEAD,
                                    PANEL_COL_BYTES, decode_panel, pack_panel, gemm_panel,      gemm_panel_scaled,
                                    gemm_blocks,     dot_q8_0,     peak_macs,  CQ_FLOAT_KERNELS};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
