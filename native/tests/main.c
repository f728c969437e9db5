/* Checks every instruction set that the host supports against references written here: integers exactly, floats within
 * derived bounds. Arguments: names that must be among them (so that a missing set cannot pass unnoticed). */
#include "check.h"

int64_t checks, failures;
uint64_t random_state;

static void test_choice(void) {
    CHECK(cq_isa_choose("no-such-set") == CQ_ERR_ARGUMENT, "unknown name");
    CHECK(cq_isa_choose(NULL) == CQ_OK && !strcmp(cq_isa_current(), cq_isa_name(0)), "the best is the default");
#if defined(__aarch64__)
    CHECK(cq_isa_choose("avx2") == CQ_ERR_UNSUPPORTED, "a set of another architecture");
#else
    CHECK(cq_isa_choose("neon") == CQ_ERR_UNSUPPORTED, "a set of another architecture");
#endif
    setenv("CQ_ISA", "scalar", 1);
    CHECK(cq_isa_choose(NULL) == CQ_OK && !strcmp(cq_isa_current(), "scalar"), "CQ_ISA lowers");
    CHECK(!strcmp(cq_isa_name(0), "scalar") && !cq_isa_name(1), "CQ_ISA bounds the list");
    setenv("CQ_ISA", "no-such-set", 1);
    CHECK(cq_isa_choose(NULL) == CQ_ERR_ARGUMENT, "CQ_ISA unknown");
    unsetenv("CQ_ISA");
}

static int is_listed(const char *name) {
    for (int32_t i = 0; cq_isa_name(i); i++)
        if (!strcmp(cq_isa_name(i), name)) return 1;
    return 0;
}

int main(int argc, char **argv) {
    for (int i = 1; i < argc; i++)
        if (!is_listed(argv[i])) return printf("FAIL %s is not supported on this host\n", argv[i]), 1;
    test_choice();
    for (int32_t i = 0; cq_isa_name(i); i++) {
        const int64_t before = checks;
        random_state = 0x9e3779b97f4a7c15u;
        if (cq_isa_choose(cq_isa_name(i))) return printf("FAIL cannot choose %s\n", cq_isa_name(i)), 1;
        test_integers();
        const int64_t integers = checks - before;
        test_floats();
        test_attention();
        test_clustering();
        printf("%-13s %lld integer checks, %lld float checks, %lld failures so far\n", cq_isa_current(),
               (long long)integers, (long long)(checks - before - integers), (long long)failures);
    }
    return failures != 0;
}
