/* The instruction sets, best first. This list is the only one: the declarations of their tables (kernels.h,
 * cluster_kernels.h), the choice among them (dispatch.c), the names that --isa knows and the tests follow from it.
 *
 *   symbol      cq_kernels_<symbol> is the table to run models
 *   name        in --isa and CQ_ISA
 *   clustering  cq_cluster_kernels_<clustering> is the table to convert them; some sets have another one's
 *   compiled    CQ_ON_...(x): x where this compiler makes both tables, else NULL */
#ifndef CQ_LIST_H
#define CQ_LIST_H

/* clang-format off */
#define CQ_INSTRUCTION_SETS(SET)                              \
    SET(avx512vbmi,   "avx512vbmi",   avx512,   CQ_ON_X86_64)   \
    SET(avx512,       "avx512",       avx512,   CQ_ON_X86_64)   \
    SET(avxvnni,      "avxvnni",      avx2,     CQ_ON_AVX_VNNI) \
    SET(avx2,         "avx2",         avx2,     CQ_ON_X86_64)   \
    SET(neon_dotprod, "neon-dotprod", neon,     CQ_ON_AARCH64)  \
    SET(neon,         "neon",         neon,     CQ_ON_AARCH64)  \
    SET(portable,     "scalar",       portable, CQ_ON_ANY)
/* clang-format on */

#define CQ_ON_ANY(x) x

#if defined(__x86_64__)
#define CQ_ON_X86_64(x) x
#else
#define CQ_ON_X86_64(x) NULL
#endif

/* Compilers that know AVX-VNNI. */
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define CQ_AVX_VNNI
#define CQ_ON_AVX_VNNI(x) x
#else
#define CQ_ON_AVX_VNNI(x) NULL
#endif

#if defined(__aarch64__)
#define CQ_ON_AARCH64(x) x
#else
#define CQ_ON_AARCH64(x) NULL
#endif
#endif
