/* Which instruction set runs: one table, best first, chosen once. CQ_ISA in the environment bounds the choice from
 * above. */
#include "cluster_kernels.h"
#include "kernels.h"
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Tables are NULL where the set is another architecture's: its name is then "not supported here" and not "unknown". */
typedef struct {
    const char *name;
    const cq_kernels *kernels;
    const cq_cluster_kernels *clustering;
} instruction_set;

#define CQ_ENTRY(symbol, name, clustering, compiled)                                                                   \
    {name, compiled(&cq_kernels_##symbol), compiled(&cq_cluster_kernels_##clustering)},
static const instruction_set table[] = {CQ_INSTRUCTION_SETS(CQ_ENTRY)};
#undef CQ_ENTRY
enum { N_SETS = sizeof table / sizeof *table };

static _Atomic(const instruction_set *) current;

/* Position of a name in the table, or N_SETS. */
static int32_t position_of(const char *name) {
    int32_t i = 0;
    while (i < N_SETS && strcmp(table[i].name, name)) i++;
    return i;
}

/* The first set that CQ_ISA allows: all from there on, none of them if it names a set of another architecture. */
static int32_t ceiling(void) {
    const char *limit = getenv("CQ_ISA");
    if (!limit || !*limit) return 0;
    const int32_t i = position_of(limit);
    return i < N_SETS && table[i].kernels ? i : N_SETS;
}

static int is_supported(const instruction_set *set) { return set->kernels && set->kernels->supported(); }

/* The index-th set that the host supports and CQ_ISA allows, or NULL. */
static const instruction_set *available(int32_t index) {
    for (int32_t i = ceiling(); i < N_SETS; i++)
        if (is_supported(&table[i]) && index-- == 0) return &table[i];
    return NULL;
}

const char *cq_isa_known(int32_t index) { return index < 0 || index >= N_SETS ? NULL : table[index].name; }

const char *cq_isa_name(int32_t index) {
    const instruction_set *set = index < 0 ? NULL : available(index);
    return set ? set->name : NULL;
}

int cq_isa_choose(const char *name) {
    const char *limit = getenv("CQ_ISA");
    if ((limit && *limit && position_of(limit) == N_SETS) || (name && position_of(name) == N_SETS))
        return CQ_ERR_ARGUMENT;
    if (name && position_of(name) < ceiling()) return CQ_ERR_UNSUPPORTED;
    const instruction_set *set = name ? &table[position_of(name)] : available(0);
    if (!set || !is_supported(set)) return CQ_ERR_UNSUPPORTED;
    atomic_store(&current, set);
    return CQ_OK;
}

static const instruction_set *in_use(void) {
    if (!atomic_load(&current)) cq_isa_choose(NULL);
    return atomic_load(&current);
}

const cq_kernels *cq_kernels_current(void) {
    const instruction_set *set = in_use();
    return set ? set->kernels : NULL;
}

const cq_cluster_kernels *cq_cluster_kernels_current(void) {
    const instruction_set *set = in_use();
    return set ? set->clustering : NULL;
}

const char *cq_isa_current(void) {
    const instruction_set *set = in_use();
    return set ? set->name : NULL;
}
