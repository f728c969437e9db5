/* PTX instructions, one function each. The tests replace this file by C++ with the same meaning. */
#ifndef CQ_PTX_CUH
#define CQ_PTX_CUH

#define CQ_DEVICE static __device__ __forceinline__
/* A block's shared array: name[count]. A macro, as the tests allocate and poison it. */
#define CQ_SHARED(type, name, count) __shared__ __align__(16) type name[count]

/* Shared memory whose size the launch gives. */
#define CQ_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]

/* prmt: four bytes out of the eight of a (0-3) and b (4-7), one per nibble of the selector's lower half; the nibbles'
 * upper bits must be zero. */
CQ_DEVICE u32 byte_permute(u32 a, u32 b, u32 selector) {
    u32 bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
    return bytes;
}

/* dp4a: sum plus the products of four unsigned bytes with four signed ones. */
CQ_DEVICE int dot_unsigned(u32 unsigned_bytes, u32 signed_bytes, int sum) {
    int out;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(out) : "r"(unsigned_bytes), "r"(signed_bytes), "r"(sum));
    return out;
}

/* dp4a of signed bytes. */
CQ_DEVICE int dot_signed(u32 a, u32 b, int sum) {
    int out;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(sum));
    return out;
}

/* mma.sync of int8: d[16][8] += a[16][32] b[32][8]. With g = lane / 4 and t = lane % 4 a lane holds
 *   a: bytes 4t.. of rows g and g + 8, then bytes 16 + 4t.. of both;   b: bytes 4t.. and 16 + 4t.. of column g;
 *   d: columns 2t, 2t + 1 of row g, then of row g + 8.
 * Turing's instruction is a quarter as large; its fragments are the registers of the large one. */
CQ_DEVICE void matrix_multiply(int *d, const u32 *a, const u32 *b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int part = 0; part < 4; part++) /* upper and lower rows, times two halves of the depth */
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
            : "+r"(d[part % 2 * 2]), "+r"(d[part % 2 * 2 + 1])
            : "r"(a[part]), "r"(b[part / 2]));
#endif
}

/* ldmatrix: four 8 x 16 byte matrices; lane l names row l % 8 of matrix l / 8 (16-byte aligned, in shared memory) and
 * gets bytes 4 (l % 4) .. + 3 of row l / 4 of each. */
CQ_DEVICE void load_matrices(u32 *out, const void *row) {
    const u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

/* cp.async: 16 bytes from global to shared memory, zeros if not `valid`, complete after copy_wait. Turing copies at
 * once. Both addresses are multiples of 16. */
CQ_DEVICE void copy_async(void *shared, const void *global, bool valid) {
#if __CUDA_ARCH__ >= 800
    const u32 address = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(address), "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
                 : "memory");
#else
    *(uint4 *)shared = valid ? *(const uint4 *)global : make_uint4(0, 0, 0, 0);
#endif
}

/* cp.async.wait_all: this thread's copies are complete (a barrier then shows them to the block). */
CQ_DEVICE void copy_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

/* cvt: half precision, exact one way, to nearest with ties to even the other. */
CQ_DEVICE float from_half(u16 half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}
CQ_DEVICE u16 to_half(float value) {
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
#endif
