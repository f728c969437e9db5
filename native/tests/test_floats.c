/* Float operations against double references; every bound counts roundings of half a unit, 2^-24. */
#include "check.h"

static const double EPS = 0x1p-24;
static const int32_t sizes[] = {1, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 576, 1027, 2048};
enum { N_SIZES = sizeof sizes / sizeof *sizes };

static float *random_floats(guarded *memory, int32_t n, float scale) {
    *memory = guarded_new((size_t)n * 4);
    float *x = memory->data;
    for (int32_t i = 0; i < n; i++) x[i] = scale * random_float();
    return x;
}

static double f16_value(uint16_t f16) {
    const int32_t exponent = f16 >> 10 & 31, mantissa = f16 & 1023;
    const double sign = f16 >> 15 ? -1 : 1;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    return sign * (exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24));
}

static void check_f16(void) {
    const cq_kernels *kernels = cq_kernels_current();
    static uint16_t f16[65536], back[65536];
    static float values[65536];
    for (int32_t i = 0; i < 65536; i++) f16[i] = (uint16_t)i;
    kernels->f16_to_f32(f16, values, 65536);
    kernels->f32_to_f16(values, back, 65536);
    for (int32_t i = 0; i < 65536; i++) {
        const double want = f16_value((uint16_t)i);
        CHECK(isnan(want) ? isnan(values[i]) : values[i] == want && !signbit(values[i]) == (i < 0x8000), "f16 %04x", i);
        CHECK(isnan(want) ? (back[i] & 0x7fff) > 0x7c00 : back[i] == i, "f16 %04x comes back as %04x", i, back[i]);
    }
    for (int32_t i = 0; i < 0x7c00; i++) { /* between neighbours: ties go to the even one */
        const double above = i + 1 == 0x7c00 ? 65536.0 : f16_value((uint16_t)(i + 1));
        const float middle = (float)((f16_value((uint16_t)i) + above) / 2);
        const float x[3] = {nextafterf(middle, 0), middle, nextafterf(middle, INFINITY)};
        uint16_t got[3];
        kernels->f32_to_f16(x, got, 3);
        CHECK(got[0] == i && got[1] == i + (i & 1) && got[2] == i + 1, "f16 around %a: %04x %04x %04x", middle, got[0],
              got[1], got[2]);
    }
    const float special[5] = {1e30f, -1e30f, INFINITY, 1e-30f, -1e-30f};
    uint16_t got[5];
    kernels->f32_to_f16(special, got, 5);
    CHECK(got[0] == 0x7c00 && got[1] == 0xfc00 && got[2] == 0x7c00 && got[3] == 0 && got[4] == 0x8000, "f16 extremes");
}

static void check_rms_norm(int32_t n) {
    guarded mx, mw, mo;
    const float *x = random_floats(&mx, n, 3), *weight = random_floats(&mw, n, 2);
    float *out = random_floats(&mo, n, 1);
    double squares = 0;
    for (int32_t i = 0; i < n; i++) squares += (double)x[i] * x[i];
    const double scale = 1 / sqrt(squares / n + (double)1e-5f);
    for (int32_t with = 0; with < 2; with++) {
        cq_kernels_current()->rms_norm(x, with ? weight : NULL, out, n, 1e-5f);
        for (int32_t i = 0; i < n; i++) {
            const double want = x[i] * scale * (with ? weight[i] : 1);
            CHECK(fabs(out[i] - want) <= 4 * EPS * fabs(want), "rms_norm n %d [%d]: %g, want %g", n, i, out[i], want);
        }
    }
    guarded_free(mx), guarded_free(mw), guarded_free(mo);
}

static void check_quantize(int32_t n, int32_t bits, int32_t group, float magnitude) {
    const size_t n_groups = (size_t)(group ? n / group : 1);
    guarded mx, mq = guarded_new((size_t)n), ms = guarded_new(sizeof(float) * n_groups),
                msum = guarded_new(sizeof(int32_t) * n_groups);
    float *x = random_floats(&mx, n, magnitude), top = bits == 8 ? 127 : 7;
    const int8_t *q = mq.data;
    const float *scales = ms.data;
    for (int32_t i = 0; i < n / 3; i++)
        x[i] = magnitude * (float)((int32_t)(random_u32() % 255) - 127) / 254; /* ties */
    const int32_t *sums = msum.data;
    cq_kernels_current()->quantize(x, n, bits, group, mq.data, ms.data, msum.data);
    for (int32_t first = 0, step = group ? group : n; first < n; first += step) {
        float largest = 0;
        int32_t sum = 0;
        for (int32_t i = first; i < first + step; i++) largest = fmaxf(largest, fabsf(x[i]));
        const float scale = largest / top, inverse = scale > 0 ? 1 / scale : 0;
        CHECK(scales[first / step] == scale, "quantize scale n %d: %g, want %g", n, scales[first / step], scale);
        for (int32_t i = first; i < first + step; i++) {
            const float product = x[i] * inverse, want = isnan(product) ? 0 : fmaxf(-top, fminf(top, rintf(product)));
            sum += (int32_t)want;
            CHECK(q[i] == want, "quantize n %d bits %d [%d] of %g: %d, want %g", n, bits, i, x[i], q[i], want);
        }
        CHECK(sums[first / step] == sum, "quantize sum %d, want %d", sums[first / step], sum);
    }
    guarded_free(mx), guarded_free(mq), guarded_free(ms), guarded_free(msum);
}

static void check_swiglu(int32_t n, float range) {
    guarded mg, mu, mo;
    const float *gate = random_floats(&mg, n, range), *up = random_floats(&mu, n, 2);
    float *out = random_floats(&mo, n, 1);
    cq_kernels_current()->swiglu(gate, up, out, n);
    for (int32_t i = 0; i < n; i++) {
        const double want = gate[i] / (1 + exp(-(double)gate[i])) * up[i];
        CHECK(fabs(out[i] - want) <= 1e-6 * fabs(want) + 1e-35, "swiglu(%g, %g): %g, want %g", gate[i], up[i], out[i],
              want);
    }
    guarded_free(mg), guarded_free(mu), guarded_free(mo);
}

static void check_swiglu_extremes(void) {
    const float gate[8] = {1e4f, -1e4f, INFINITY, -INFINITY, 88.5f, -88.5f, 0, NAN}, up[8] = {1, 1, 1, 1, 1, 1, 1, 1};
    float out[8];
    cq_kernels_current()->swiglu(gate, up, out, 8);
    CHECK(out[0] == 1e4f && fabsf(out[1]) < 1e-30f && out[2] == INFINITY && fabsf(out[3]) < 1e-30f, "swiglu extremes");
    CHECK(out[4] == 88.5f && fabsf(out[5]) < 1e-30f && out[6] == 0 && isnan(out[7]), "swiglu extremes");
}

static void check_rope(int32_t n_rot, int32_t interleaved) {
    guarded mx, mc;
    float *x = random_floats(&mx, n_rot, 3), *before = malloc((size_t)n_rot * 4);
    const float *cos_sin = random_floats(&mc, n_rot, 1);
    const int32_t step = interleaved ? 2 : 1, distance = interleaved ? 1 : n_rot / 2;
    memcpy(before, x, (size_t)n_rot * 4);
    cq_kernels_current()->rope(x, cos_sin, n_rot, interleaved);
    for (int32_t i = 0; i < n_rot / 2; i++) {
        const int32_t first = i * step, second = first + distance;
        const double a = before[first], b = before[second], c = cos_sin[2 * i], s = cos_sin[2 * i + 1];
        CHECK(fabs(x[first] - (a * c - b * s)) <= 2 * EPS * (fabs(a * c) + fabs(b * s)), "rope %d [%d]", n_rot, first);
        CHECK(fabs(x[second] - (b * c + a * s)) <= 2 * EPS * (fabs(b * c) + fabs(a * s)), "rope %d [%d]", n_rot,
              second);
    }
    free(before);
    guarded_free(mx), guarded_free(mc);
}

static void check_linear_ops(int32_t n) {
    guarded mx, my, ms, ma = guarded_new((size_t)n * 4);
    float *x = random_floats(&mx, n, 3), *y = random_floats(&my, n, 3), *before = malloc((size_t)n * 4);
    const float *row_scales = random_floats(&ms, n, 0.01f);
    int32_t *acc = ma.data;
    for (int32_t i = 0; i < n; i++) acc[i] = random_between(-2000000000, 2000000000);
    memcpy(before, y, (size_t)n * 4);
    cq_kernels_current()->axpy(0.7f, x, y, n);
    for (int32_t i = 0; i < n; i++) {
        const double product = (double)0.7f * x[i], want = before[i] + product;
        CHECK(fabs(y[i] - want) <= EPS * (2 * fabs(product) + fabs(want)), "axpy n %d [%d]", n, i);
    }
    for (int32_t accumulate = 0; accumulate < 2; accumulate++) {
        memcpy(before, y, (size_t)n * 4);
        cq_kernels_current()->scale_acc(acc, row_scales, 0.3f, y, n, accumulate);
        for (int32_t i = 0; i < n; i++) {
            const double product = (double)acc[i] * row_scales[i] * 0.3f, want = product + (accumulate ? before[i] : 0);
            CHECK(fabs(y[i] - want) <= EPS * (4 * fabs(product) + fabs(want)), "scale_acc n %d [%d]", n, i);
        }
    }
    free(before);
    guarded_free(mx), guarded_free(my), guarded_free(ms), guarded_free(ma);
}

static void check_dots(int32_t n, int32_t n_tokens) {
    guarded mw, mx, mh = guarded_new((size_t)n * 2);
    const float *w = random_floats(&mw, n, 1), *rows = random_floats(&mx, n * n_tokens, 1), *x[9];
    uint16_t *f16 = mh.data;
    float dot[10], dot_of_f16[10];
    for (int32_t i = 0; i < n; i++) f16[i] = (uint16_t)(random_between(0, 0x3bff) | (i % 3 ? 0x8000 : 0));
    for (int32_t t = 0; t < n_tokens; t++) x[t] = rows + (int64_t)t * n;
    dot[n_tokens] = dot_of_f16[n_tokens] = 7;
    cq_kernels_current()->dot_f32(w, x, n_tokens, n, dot);
    cq_kernels_current()->dot_f16(f16, x, n_tokens, n, dot_of_f16);
    for (int32_t t = 0; t < n_tokens; t++) {
        double want = 0, magnitude = 0, want_f16 = 0, magnitude_f16 = 0;
        for (int32_t i = 0; i < n; i++) {
            want += (double)w[i] * x[t][i], magnitude += fabs((double)w[i] * x[t][i]);
            const double product = f16_value(f16[i]) * x[t][i];
            want_f16 += product, magnitude_f16 += fabs(product);
        }
        CHECK(fabs(dot[t] - want) <= (n + 1) * EPS * magnitude, "dot_f32 n %d token %d", n, t);
        CHECK(fabs(dot_of_f16[t] - want_f16) <= (n + 1) * EPS * magnitude_f16, "dot_f16 n %d token %d", n, t);
    }
    CHECK(dot[n_tokens] == 7 && dot_of_f16[n_tokens] == 7, "dot wrote past its tokens");
    guarded_free(mw), guarded_free(mx), guarded_free(mh);
}

void test_floats(void) {
    check_f16();
    check_swiglu_extremes();
    for (int32_t i = 0; i < N_SIZES; i++) {
        const int32_t n = sizes[i];
        check_rms_norm(n), check_linear_ops(n);
        check_swiglu(n, 10), check_swiglu(n, 86);
        check_rope(2 * n, 0), check_rope(2 * n, 1);
        for (int32_t bits = 4; bits <= 8; bits += 4) {
            check_quantize(n, bits, 0, 5), check_quantize(n, bits, 0, 0), check_quantize(n, bits, 0, 1e-40f);
            if (n % 32 == 0) check_quantize(n, bits, 32, 5);
        }
        for (int32_t n_tokens = 1; n_tokens <= 9; n_tokens++) check_dots(n, n_tokens);
    }
}
