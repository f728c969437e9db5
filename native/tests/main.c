/* Checks every instruction set that the host supports against references written here: integers exactly, floats within
 * derived bounds. Arguments: names that must be among them (so that a missing set cannot pass unnoticed). */
#include "check.h"

int64_t checks, failures;
uint64_t random_state;

/* Whether this host supports it and CQ_ISA allows it. */
static int is_listed(const char *name) {
    for (int32_t i = 0; cq_isa_name(i); i++)
        if (!strcmp(cq_isa_name(i), name)) return 1;
    return 0;
}

/* CQ_ISA leaves, of the sets that the host supports, the named one and those after it; none if the name is another
 * architecture's. */
static void test_limits(void) {
    for (int32_t limit = 0; cq_isa_known(limit); limit++) {
        int supported[32], n_left = 0, n_sets = 0;
        unsetenv("CQ_ISA");
        for (; cq_isa_known(n_sets); n_sets++) supported[n_sets] = is_listed(cq_isa_known(n_sets));
        setenv("CQ_ISA", cq_isa_known(limit), 1);
        for (int32_t i = 0; i < n_sets; i++) n_left += is_listed(cq_isa_known(i));
        for (int32_t i = 0; i < n_sets && n_left; i++)
            CHECK(is_listed(cq_isa_known(i)) == (supported[i] && i >= limit), "CQ_ISA=%s: %s", cq_isa_known(limit),
                  cq_isa_known(i));
        CHECK((cq_isa_choose(NULL) == CQ_OK) == (n_left > 0), "CQ_ISA=%s", cq_isa_known(limit));
        CHECK(n_left > 0 || !supported[limit], "CQ_ISA=%s leaves a set that is supported", cq_isa_known(limit));
    }
    unsetenv("CQ_ISA");
}

static void test_choice(void) {
    CHECK(cq_isa_choose("no-such-set") == CQ_ERR_ARGUMENT, "unknown name");
    CHECK(cq_isa_choose(NULL) == CQ_OK && !strcmp(cq_isa_current(), cq_isa_name(0)), "the best is the default");
    for (int32_t i = 0; cq_isa_known(i); i++) {
        const int listed = is_listed(cq_isa_known(i));
        CHECK(cq_isa_choose(cq_isa_known(i)) == (listed ? CQ_OK : CQ_ERR_UNSUPPORTED), "%s", cq_isa_known(i));
        CHECK(!listed || !strcmp(cq_isa_current(), cq_isa_known(i)), "%s is in use", cq_isa_known(i));
    }
    test_limits();
    setenv("CQ_ISA", "scalar", 1);
    CHECK(cq_isa_choose(NULL) == CQ_OK && !strcmp(cq_isa_current(), "scalar"), "CQ_ISA lowers");
    CHECK(!strcmp(cq_isa_name(0), "scalar") && !cq_isa_name(1), "CQ_ISA bounds the list");
    setenv("CQ_ISA", "no-such-set", 1);
    CHECK(cq_isa_choose(NULL) == CQ_ERR_ARGUMENT, "CQ_ISA unknown");
    unsetenv("CQ_ISA");
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
