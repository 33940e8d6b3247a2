/* The size-weighted mean of the members of each merged token, in the order of operations of `tokenmerge.ops.combine`.

   This file is compiled without fused multiply-add, so that the results are those of PyTorch's operators to the bit. */

#include "rows.h"

#define TINY 1e-12f
#define CHUNK 64 /* rows that one thread copies at once */

typedef struct {
    const char *x;
    int dtype, log_dtype;
    i64 tokens, left, r, channels, per_image, per_token;
    const float *size;
    const i64 *kept, *source, *target;
    char *out;
    float *out_size;
    char *out_log; /* may be NULL */
    float log_least;
} Merge;

static const char *row_of(const Merge *job, i64 image, i64 token) {
    return job->x + width_of(job->dtype) * (size_t)(image * job->per_image + token * job->per_token);
}

static void join(const Merge *job, i64 image, const i64 *kept, float *sums, int32_t *slots) {
    const i64 *source = job->source + image * job->r, *target = job->target + image * job->r;
    const float *size = job->size ? job->size + image * job->tokens : NULL, *total = job->out_size + image * job->left;
    size_t row_bytes = width_of(job->dtype) * (size_t)job->channels;
    char *out = job->out + (size_t)(image * job->left) * row_bytes;
    int is_wide = job->dtype == FLOAT32;
    float *other = sums + (is_wide ? 0 : job->r * job->channels), *aimed = other + job->channels;
    int32_t used = 0;
    for (i64 i = 0; i < job->r; i++) {
        float weight = total[target[i]];
        float share = (size ? size[source[i]] : 1.0f) / (weight < TINY ? TINY : weight);
        const char *own = row_of(job, image, kept[target[i]]), *joining = row_of(job, image, source[i]);
        if (is_wide) {
            float *sum = (float *)(out + (size_t)target[i] * row_bytes);
            const float *to = (const float *)own, *from = (const float *)joining;
            for (i64 c = 0; c < job->channels; c++) sum[c] += (from[c] - to[c]) * share;
            continue;
        }
        read_row(own, job->dtype, job->channels, aimed);
        read_row(joining, job->dtype, job->channels, other);
        if (slots[target[i]] < 0) { /* the first source of this token */
            slots[target[i]] = used++;
            memcpy(sums + (i64)slots[target[i]] * job->channels, aimed, 4 * (size_t)job->channels);
        }
        float *sum = sums + (i64)slots[target[i]] * job->channels;
        for (i64 c = 0; c < job->channels; c++) sum[c] += (other[c] - aimed[c]) * share;
    }
    for (i64 i = 0; i < job->r && !is_wide; i++)
        if (slots[target[i]] >= 0) {
            write_row(sums + (i64)slots[target[i]] * job->channels, job->dtype, job->channels,
                      out + (size_t)target[i] * row_bytes);
            slots[target[i]] = -1;
        }
}

/* Copy the tokens that represent the new positions from `from` to `to`, and their sizes. */
static void copy_kept(const Merge *job, i64 image, i64 from, i64 to) {
    const i64 *kept = job->kept + image * job->left;
    const float *size = job->size ? job->size + image * job->tokens : NULL;
    float *total = job->out_size + image * job->left;
    size_t row_bytes = width_of(job->dtype) * (size_t)job->channels;
    char *out = job->out + (size_t)(image * job->left) * row_bytes;
    for (i64 place = from; place < to; place++) {
        memcpy(out + (size_t)place * row_bytes, row_of(job, image, kept[place]), row_bytes);
        total[place] = size ? size[kept[place]] : 1.0f;
    }
}

/* Let the sources join the copied tokens, and write the logarithms of the sizes. */
static void join_image(const Merge *job, i64 image, float *sums, int32_t *slots) {
    const i64 *source = job->source + image * job->r, *target = job->target + image * job->r;
    const float *size = job->size ? job->size + image * job->tokens : NULL;
    float *total = job->out_size + image * job->left;
    for (i64 i = 0; i < job->r; i++) total[target[i]] += size ? size[source[i]] : 1.0f;
    join(job, image, job->kept + image * job->left, sums, slots);
    if (!job->out_log) return;
    char *log = job->out_log + width_of(job->log_dtype) * (size_t)(image * job->left);
    for (i64 place = 0; place < job->left; place++) {
        float value = logf(total[place]);
        value = value < job->log_least ? job->log_least : value;
        write_row(&value, job->log_dtype, 1, log + width_of(job->log_dtype) * (size_t)place);
    }
}

void tokenmerge_match(const void *keys, i64 dtype, i64 batch, i64 heads, i64 tokens, i64 dim, i64 per_image, i64 per_head,
                      i64 per_token, i64 r, i64 is_protected, i64 *kept, i64 *source, i64 *target, float *scratch, i64 threads);

static int in_range(const i64 *index, i64 count, i64 limit) {
    for (i64 i = 0; i < count; i++)
        if (index[i] < 0 || index[i] >= limit) return 0;
    return 1;
}

/* Merge the tokens `x [B, N, C]` of a batch, with the given strides in numbers and stride 1 along C, by a plan.
   Return 0 without doing anything if the plan names a token that does not exist. */
i64 tokenmerge_merge(const void *x, i64 dtype, i64 batch, i64 tokens, i64 channels, i64 per_image, i64 per_token,
                      const float *size, i64 left, i64 r, const i64 *kept, const i64 *source, const i64 *target, void *out,
                      float *out_size, void *out_log, i64 log_dtype, float log_least, i64 threads) {
    Merge job = {.x = x, .dtype = (int)dtype, .log_dtype = (int)log_dtype, .tokens = tokens, .left = left, .r = r,
                 .channels = channels, .per_image = per_image, .per_token = per_token, .size = size, .kept = kept,
                 .source = source, .target = target, .out = out, .out_size = out_size, .out_log = out_log,
                 .log_least = log_least};
    if (!in_range(kept, batch * left, tokens) || !in_range(source, batch * r, tokens) || !in_range(target, batch * r, left))
        return 0;
    i64 chunks = (left + CHUNK - 1) / CHUNK;
    (void)threads; /* without OpenMP */
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    {
#pragma omp for schedule(static)
        for (i64 task = 0; task < batch * chunks; task++) {
            i64 from = task % chunks * CHUNK, to = from + CHUNK < left ? from + CHUNK : left;
            copy_kept(&job, task / chunks, from, to);
        }
        i64 slots_floats = job.dtype == FLOAT32 ? 0 : r * channels;
        float *sums = malloc(4 * (size_t)(slots_floats + 2 * channels) + 4 * (size_t)left);
        int32_t *slots = (int32_t *)(sums + slots_floats + 2 * channels);
        for (i64 place = 0; place < left; place++) slots[place] = -1;
#pragma omp for schedule(static)
        for (i64 image = 0; image < batch; image++) join_image(&job, image, sums, slots);
        free(sums);
    }
    return 1;
}

/* The arguments of both functions, each as 8 bytes. */
typedef struct {
    const void *keys;
    i64 keys_dtype, batch, heads, tokens, dim, keys_per_image, keys_per_head, keys_per_token, r, is_protected;
    i64 *kept, *source, *target;
    float *scratch;
    i64 match_threads;
    const void *x;
    i64 dtype, channels, per_image, per_token;
    const float *size;
    void *out;
    float *out_size;
    void *out_log;
    i64 log_dtype, merge_threads;
    double log_least;
} Both;

/* Match and merge in one call, which saves a block the preparation of a second one. */
void tokenmerge_match_and_merge(const char *packed) {
    Both both;
    memcpy(&both, packed, sizeof both);
    tokenmerge_match(both.keys, both.keys_dtype, both.batch, both.heads, both.tokens, both.dim, both.keys_per_image,
                     both.keys_per_head, both.keys_per_token, both.r, both.is_protected, both.kept, both.source, both.target,
                     both.scratch, both.match_threads);
    tokenmerge_merge(both.x, both.dtype, both.batch, both.tokens, both.channels, both.per_image, both.per_token, both.size,
                     both.tokens - both.r, both.r, both.kept, both.source, both.target, both.out, both.out_size, both.out_log,
                     both.log_dtype, (float)both.log_least, both.merge_threads);
}

_Static_assert(sizeof(Both) == 28 * 8, "ops/native.py packs 28 numbers of 8 bytes");
