/* AVX-512 with VNNI (Cascade Lake and later). */
#if defined(__x86_64__)
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"))),   \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prefer-vector-width=512")
#include <immintrin.h>
#endif
#include "isa/avx512_core.h"

const cq_kernels cq_kernels_avx512 = {"avx512",    has_avx512_vnni, gemv,       PANEL_ROWS,      0,
                                      PANEL_ROWS,  decode_panel,    pack_panel, gemm_panel,      gemm_panel_scaled,
                                      gemm_blocks, dot_q8_0,        peak_macs,  CQ_FLOAT_KERNELS};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
