/* Which instruction set runs: one table, best first, chosen once. CQ_ISA in the environment bounds the choice from
 * above. */
#include "kernels.h"
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static const cq_kernels *const table[] = {
#if defined(__x86_64__)
    &cq_kernels_avx512vbmi, &cq_kernels_avx512,
#ifdef CQ_AVX_VNNI
    &cq_kernels_avxvnni,
#endif
    &cq_kernels_avx2,
#elif defined(__aarch64__)
    &cq_kernels_neon_dotprod,
    &cq_kernels_neon,
#endif
    &cq_kernels_portable,
};
enum { N_SETS = sizeof table / sizeof *table };

/* Every name --isa knows, so that one of another architecture is "not supported here" and not "unknown". */
static const char *const names[] = {"avx512vbmi", "avx512", "avxvnni", "avx2", "neon-dotprod", "neon", "scalar"};

static _Atomic(const cq_kernels *) current;

static int is_known(const char *name) {
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (!strcmp(names[i], name)) return 1;
    return 0;
}

/* Position of a name in the table, or N_SETS. */
static int32_t position_of(const char *name) {
    int32_t i = 0;
    while (i < N_SETS && strcmp(table[i]->name, name)) i++;
    return i;
}

/* The first set that CQ_ISA allows. */
static int32_t ceiling(void) {
    const char *limit = getenv("CQ_ISA");
    return limit && *limit ? position_of(limit) : 0;
}

/* The index-th set that the host supports and CQ_ISA allows, or NULL. */
static const cq_kernels *available(int32_t index) {
    for (int32_t i = ceiling(); i < N_SETS; i++)
        if (table[i]->supported() && index-- == 0) return table[i];
    return NULL;
}

const char *cq_isa_name(int32_t index) {
    const cq_kernels *kernels = index < 0 ? NULL : available(index);
    return kernels ? kernels->name : NULL;
}

int cq_isa_choose(const char *name) {
    const char *limit = getenv("CQ_ISA");
    if ((limit && *limit && !is_known(limit)) || (name && !is_known(name))) return CQ_ERR_ARGUMENT;
    const int32_t wanted = name ? position_of(name) : ceiling();
    if (wanted >= N_SETS || wanted < ceiling()) return CQ_ERR_UNSUPPORTED;
    const cq_kernels *kernels = name ? table[wanted] : available(0);
    if (!kernels->supported()) return CQ_ERR_UNSUPPORTED;
    atomic_store(&current, kernels);
    return CQ_OK;
}

const cq_kernels *cq_kernels_current(void) {
    if (!atomic_load(&current)) cq_isa_choose(NULL);
    return atomic_load(&current);
}

const char *cq_isa_current(void) {
    const cq_kernels *kernels = cq_kernels_current();
    return kernels ? kernels->name : NULL;
}
