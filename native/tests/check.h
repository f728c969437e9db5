/* What the standalone kernel tests share: random numbers, guarded memory, one line per failure. */
#ifndef CQ_CHECK_H
#define CQ_CHECK_H
#include "kernels.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

extern int64_t checks, failures;
extern uint64_t random_state;

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        checks++;                                                                                                      \
        if (!(condition) && ++failures <= 20) {                                                                        \
            printf("FAIL [%s] %s: ", cq_isa_current(), #condition);                                                    \
            printf(__VA_ARGS__);                                                                                       \
            printf("\n");                                                                                              \
        }                                                                                                              \
    } while (0)

static inline uint32_t random_u32(void) {
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 16);
}

static inline int32_t random_between(int32_t low, int32_t high) {
    return (int32_t)(low + (int64_t)(random_u32() % ((uint32_t)high - (uint32_t)low + 1)));
}

static inline float random_float(void) { return (float)random_between(-1000000, 1000000) * 1e-6f; }

/* Memory whose last byte is followed by a page that no one may read: an overread is a segmentation fault. */
typedef struct {
    void *data, *map;
    size_t map_bytes;
} guarded;

static inline guarded guarded_new(size_t n_bytes) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), body = (n_bytes + page - 1) / page * page;
    guarded g = {.map_bytes = body + page};
    g.map = mmap(NULL, g.map_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g.map == MAP_FAILED || mprotect((char *)g.map + body, page, PROT_NONE)) exit(3);
    g.data = (char *)g.map + body - n_bytes;
    return g;
}

static inline void guarded_free(guarded g) { munmap(g.map, g.map_bytes); }

void test_integers(void);
void test_floats(void);
void test_attention(void);
void test_clustering(void);
#endif
