/* Whether this processor has what an x86 set needs. Included before the target pragma: these must run on any processor.
 */
#ifndef CQ_X86_FEATURES_H
#define CQ_X86_FEATURES_H
#include <cpuid.h>

static inline int has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static inline int has_avxvnni(void) {
    unsigned a, b, c, d;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}

static inline int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

static inline int has_avx512vbmi(void) { return has_avx512() && __builtin_cpu_supports("avx512vbmi"); }
#endif
