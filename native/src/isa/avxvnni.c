/* AVX2 with AVX-VNNI, for processors without AVX-512 (Alder Lake and later): the kernels of avx2.c, where vpdpbusd
 * multiplies and sums bytes. */
#include "kernels.h"
#ifdef CQ_AVX_VNNI
#include "isa/x86_features.h"
#if defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avxvnni")
#include <immintrin.h>
#endif
#define CQ_DPBUSD _mm256_dpbusd_avx_epi32

/* What is AVX2's own, from bytes to products: */
#include "isa/x86.h"          /* products of bytes, sums */
#include "isa/x86_f16.h"      /* f16_to_f32, f32_to_f16, dot_q8_0 */
#include "isa/avx2_vectors.h" /* vec and its primitives */
#include "isa/avx2_lookup.h"  /* tables of weights, 64 look-ups */
#include "isa/avx2_gemv.h"    /* gemv */
#include "isa/avx2_panel.h"   /* decode_panel, pack_panel, tiles, peak_macs */

/* What templates make of it: */
#include "isa/template/float_ops.h"   /* rms_norm ... dot_f16 */
#include "isa/template/attention.h"   /* attention_heads, attention_chunk */
#include "isa/template/gemm_panel.h"  /* gemm_panel, gemm_panel_scaled */
#include "isa/template/gemm_blocks.h" /* gemm_blocks */

const cq_kernels cq_kernels_avxvnni = {
    .supported = has_avxvnni,
    .gemv = gemv,
    .panel_rows = PANEL_ROWS,
    .panel_head_bytes = PANEL_HEAD,
    .panel_col_bytes = PANEL_COL_BYTES,
    .decode_panel = decode_panel,
    .pack_panel = pack_panel,
    .gemm_panel = gemm_panel,
    .gemm_panel_scaled = gemm_panel_scaled,
    .gemm_blocks = gemm_blocks,
    .dot_q8_0 = dot_q8_0,
    .peak_macs = peak_macs,
    CQ_FLOAT_KERNELS,
};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
