/* Rows of numbers in float32, bfloat16 or float16, read and written as float32. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

typedef int64_t i64;
typedef float f16x __attribute__((vector_size(64), aligned(4)));      /* 16 floats */
typedef int32_t i16x __attribute__((vector_size(64), aligned(4)));    /* 16 integers */

static inline size_t width_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

static inline float from_bfloat16(uint16_t given) {
    uint32_t bits = (uint32_t)given << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Round to the nearest bfloat16, ties to even, as PyTorch does. */
static inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : (uint16_t)rounded;
}

/* Read `count` numbers as float32. */
static inline void read_row(const void *row, int dtype, i64 count, float *out) {
    if (dtype == FLOAT32) {
        memcpy(out, row, 4 * (size_t)count);
    } else if (dtype == BFLOAT16) {
        const uint16_t *from = row;
        for (i64 c = 0; c < count; c++) out[c] = from_bfloat16(from[c]);
    } else {
#ifdef __FLT16_MANT_DIG__
        const _Float16 *from = row;
        for (i64 c = 0; c < count; c++) out[c] = (float)from[c];
#else
        abort(); /* `tokenmerge_has_float16` was not asked */
#endif
    }
}

/* Add `count` numbers to float32 sums. */
static inline void add_row(const void *row, int dtype, i64 count, float *sum) {
    if (dtype == FLOAT32) {
        const float *from = row;
        for (i64 c = 0; c < count; c++) sum[c] += from[c];
    } else if (dtype == BFLOAT16) {
        const uint16_t *from = row;
        for (i64 c = 0; c < count; c++) sum[c] += from_bfloat16(from[c]);
    } else {
#ifdef __FLT16_MANT_DIG__
        const _Float16 *from = row;
        for (i64 c = 0; c < count; c++) sum[c] += (float)from[c];
#else
        abort(); /* `tokenmerge_has_float16` was not asked */
#endif
    }
}

/* Write `count` float32 numbers, rounded to the dtype. */
static inline void write_row(const float *row, int dtype, i64 count, void *out) {
    if (dtype == FLOAT32) {
        memcpy(out, row, 4 * (size_t)count);
    } else if (dtype == BFLOAT16) {
        uint16_t *to = out;
        for (i64 c = 0; c < count; c++) to[c] = to_bfloat16(row[c]);
    } else {
#ifdef __FLT16_MANT_DIG__
        _Float16 *to = out;
        for (i64 c = 0; c < count; c++) to[c] = (_Float16)row[c];
#else
        abort(); /* `tokenmerge_has_float16` was not asked */
#endif
    }
}
