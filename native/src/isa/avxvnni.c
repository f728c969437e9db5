/* AVX2 with AVX-VNNI, for processors without AVX-512 (Alder Lake and later): vpdpbusd multiplies and sums bytes. */
#include "kernels.h"
#ifdef CQ_AVX_VNNI
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#include <immintrin.h>
#endif
#define CQ_DPBUSD _mm256_dpbusd_avx_epi32
#include "isa/avx2_core.h"
#include <cpuid.h>

static int supported(void) {
    unsigned a, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}

const cq_kernels cq_kernels_avxvnni = {"avxvnni",       supported,    gemv,       PANEL_ROWS,      PANEL_HEAD,
                                       PANEL_COL_BYTES, decode_panel, pack_panel, gemm_panel,      gemm_panel_scaled,
                                       gemm_blocks,     dot_q8_0,     peak_macs,  CQ_FLOAT_KERNELS};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
